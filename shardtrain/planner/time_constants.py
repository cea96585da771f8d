"""Rates and overlaps that no datasheet gives; their fitted values are in calibration.json."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Constants:
    """Rates and overlaps, fitted once for all hardware and software.

    Attributes:
        matmul: share of the chip's large-matmul rate that a model's bf16 matmuls reach.
        matmul_low: the same for 8-bit operands.
        matmul_four: the same for 4-bit operands.
        narrow: dim at which a matmul runs at half rate.
        experts: share of the matmul rate that grouped expert matmuls reach.
        attention: share of the bf16 matmul rate that fused attention reaches on a GPU.
        attention_older: the same where the kernel was written for an older GPU.
        attention_tpu: the same on a TPU.
        short: sequence length at which attention runs at half rate.
        misaligned: extra time of expert matmuls whose dims are no multiples of 256.
        narrow_head: head_dim at which attention runs at half rate.
        scores: passes over the s x s scores when attention is not fused.
        streams: passes over the residual stream per block, forward and backward.
        hidden: passes over the MLP's hidden layer per block.
        casts: passes over activations and weights to quantise them, for low precision.
        routing: passes over the routed tokens per mixture block.
        softmax: passes over the logits.
        launch: seconds per block and microbatch that no kernel covers.
        launch_expert: the same per mixture block (routing needs the host, or many small kernels).
        selective: share of a block's forward that "selective" recomputation repeats.
        tensor_exposed: share of tensor-parallel communication not hidden.
        expert_exposed: share of expert all-to-all not hidden.
        context_exposed: share of context-parallel communication not hidden.
        pipeline_exposed: share of stage-to-stage transfers not hidden.
        fsdp_exposed: share of FSDP communication not hidden even under ample compute.
        data_exposed: share of the gradient reduction not hidden.
        link: share of the nominal link bandwidth that collectives reach.
        latency: multiple of the nominal latencies.
        state_passes: bytes moved per parameter by the optimizer, in units of 4 bytes.
        scale: extra share of the step per doubling of chips beyond 8.
        uneven: how much of the logits the slowest pipeline stage carries alone.
    """

    matmul: float = 0.9
    matmul_low: float = 0.75
    matmul_four: float = 0.55
    narrow: float = 200.0
    experts: float = 0.6
    attention: float = 0.75
    attention_older: float = 0.45
    attention_tpu: float = 0.45
    short: float = 3000.0
    misaligned: float = 0.3
    narrow_head: float = 30.0
    scores: float = 12.0
    streams: float = 40.0
    hidden: float = 8.0
    casts: float = 6.0
    routing: float = 20.0
    softmax: float = 6.0
    launch: float = 100e-6
    launch_expert: float = 100e-6
    selective: float = 0.3
    tensor_exposed: float = 0.7
    expert_exposed: float = 0.7
    context_exposed: float = 0.5
    pipeline_exposed: float = 0.5
    fsdp_exposed: float = 0.15
    data_exposed: float = 0.4
    link: float = 0.75
    latency: float = 1.0
    state_passes: float = 8.0
    scale: float = 0.01
    uneven: float = 0.4


NAMES = tuple(field.name for field in fields(Constants))
