"""Seconds of one training step, term by term, from a `Job`.

Everything is counted per chip: FLOPs of each kind of operation over the rate that operation
reaches on that chip and dtype, bytes over memory bandwidth, collectives over the links they cross
(`topology.py`), the pipeline bubble, the optimizer. `Constants` holds the few rates and overlaps
that no datasheet gives; their values are fitted on published runs and stored in
`data/calibration.json`.
"""

import math
from dataclasses import dataclass, fields

from shardtrain.planner.job import Job
from shardtrain.planner.topology import collective_seconds

TERMS = (
    "matmul", "attention", "elementwise", "logits", "recompute", "launch", "tensor", "context",
    "expert", "fsdp", "pipeline", "bubble", "data", "optimizer", "offload", "scale",
)  # fmt: skip


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


def step_terms(job: Job, c: Constants) -> dict[str, float]:
    """Named seconds of one step, which sum to the step time.

    Args:
        job: what is trained on what.
        c: fitted rates.

    Example:
        >>> from shardtrain.hardware import chip
        >>> from shardtrain.planner.catalogue import get
        >>> job = Job(get("llama3-8b"), chip("h100"), 8, 8192, microbatch=1, fsdp=8, zero=3)
        >>> 0.3 < sum(step_terms(job, Constants()).values()) < 1.5
        True
    """
    micro = _compute(job, c)
    exposed = _communication(job, c, sum(micro.values()))
    count = job.num_microbatches
    terms = {name: seconds * count for name, seconds in (micro | exposed).items()}
    terms["bubble"] = sum(terms.values()) * job.bubble_fraction
    last = sum(micro.values())
    terms["data"] = _reduction(job, c, last)
    terms["optimizer"], terms["offload"] = _update(job, c)
    terms["scale"] = sum(terms.values()) * c.scale * math.log2(max(1.0, job.chips / 8))
    return {name: terms.get(name, 0.0) for name in TERMS}


def _compute(job: Job, c: Constants) -> dict[str, float]:
    """Seconds of one microbatch on the slowest stage, by kind of operation."""
    m = job.model
    backward = 1.0 if job.frozen else 2.0
    stage = 1 / job.pipeline
    linear = _linear(job, c)
    attention_forward, attention_backward = _attention(job, c)
    elementwise = _elementwise(job, c)
    repeat = {"full": 1.0, "selective": c.selective}.get(job.remat, 0.0)
    again = repeat * (linear + attention_forward) + repeat * elementwise / 3
    if job.remat == "selective" and not job.flash:
        again = attention_forward  # Korthikanti et al.: only the attention core is repeated
    logits = _logits(job, c) * (stage + c.uneven * (1 - stage))
    extra = 1 + m.mtp / m.layers
    blocks = stage * extra
    launches = m.layers * c.launch + m.moe_count * c.launch_expert
    launches *= blocks * (1 + 0.3 * repeat)
    if job.chip.kind == "tpu":
        launches *= 0.1  # one program per step, no kernel launches from the host
    return {
        "matmul": linear * (1 + backward) * blocks,
        "attention": (attention_forward + attention_backward) * blocks,
        "elementwise": elementwise * blocks,
        "logits": logits * (1 + m.mtp),
        "recompute": again * blocks,
        "launch": launches,
    }


def linear_rate(job: Job, c: Constants) -> float:
    """FLOP/s of wide linear layers in the job's precision."""
    faster = {"fp8": c.matmul_low, "int8": c.matmul_low, "fp4": c.matmul_four}
    kind = job.precision
    if kind == "fp4" and job.model.experts:
        kind = "fp8"  # grouped expert matmuls have no 4-bit kernels in the measured releases
    if kind in faster and job.chip.peak_flops(kind) > job.chip.peak_flops():
        return job.chip.matmul_flops(kind) * faster[kind]
    return job.chip.matmul_flops("fp32" if job.precision == "fp32" else "bf16") * c.matmul


def _linear(job: Job, c: Constants) -> float:
    """Forward seconds of all linear layers for one microbatch, not divided by stages."""
    m, rate, tokens = job.model, linear_rate(job, c), job.tokens
    width = max(m.d_ff, m.d_model) / job.tensor
    dense = m.attention_count * m.attention_matmul + m.dense_count * m.dense_matmul
    dense += m.mamba_layers * m.mamba_params + m.moe_count * m.shared_matmul
    if m.exact and not m.moe_count:
        dense = m.block_matmul
    slow = 1 + c.narrow * (1 / m.d_model + 1 / width + 1 / tokens)
    seconds = 2 * tokens * dense / job.tensor / rate * slow
    if m.moe_count:
        routed = m.moe_count * m.top_k * m.expert_matmul
        each = tokens * m.top_k / job.local_experts
        inner = m.expert_latent or m.d_model
        slow = 1 + c.narrow * (1 / inner + job.tensor / m.expert_ff + 1 / each)
        if inner % 256 or (m.expert_ff // job.tensor) % 256:
            slow *= 1 + c.misaligned
        seconds += 2 * tokens * routed / job.tensor / (rate * c.experts) * slow
    return seconds


def _attention(job: Job, c: Constants) -> tuple[float, float]:
    """(forward, backward) seconds of the attention core for one microbatch, all blocks."""
    m = job.model
    qk, value = m.attention_width()
    keys = m.attention_tokens(job.sequence, job.causal)
    flops = 2 * job.tokens * (qk + value) * keys / job.tensor
    share = c.attention if job.tuned_attention else c.attention_older
    share = c.attention_tpu if job.chip.kind == "tpu" else share
    head = qk / m.n_heads
    slow = (1 + c.narrow_head / head) * (1 + c.short / job.sequence)
    seconds = flops / (job.chip.matmul_flops() * share) * slow
    if job.flash:
        return seconds, 2.5 * seconds
    cells = job.tokens * m.n_heads / job.tensor * m.attention_count * job.sequence
    passes = cells * 2 * c.scores / job.chip.memory_bandwidth
    return seconds + passes / 3, 2 * seconds + passes * 2 / 3


def _elementwise(job: Job, c: Constants) -> float:
    """Memory-bound seconds of one microbatch, all blocks: norms, residuals, activations, casts."""
    m = job.model
    hidden = m.dense_count * m.d_ff * (m.mlp_matrices - 1)
    hidden += m.moe_count * (m.top_k * m.expert_ff + m.shared_ff) * (m.mlp_matrices - 1)
    split = job.tensor if job.sequence_parallel else 1
    wide = m.layers * m.d_model
    elements = c.streams * wide * (0.5 / split + 0.5 / job.tensor) + c.hidden * hidden / job.tensor
    if m.moe_count:
        elements += c.routing * m.moe_count * m.top_k * (m.expert_latent or m.d_model) / job.tensor
    traffic = 2 * job.tokens * elements
    if job.precision in {"fp8", "fp4", "int8"}:
        weights = m.block_matmul - m.moe_count * m.experts * m.expert_matmul
        weights += m.moe_count * job.local_experts * m.expert_matmul
        traffic += c.casts * (2 * job.tokens * (2 * wide + hidden) + weights) / job.tensor
    return traffic / job.chip.memory_bandwidth


def _logits(job: Job, c: Constants) -> float:
    """Seconds of the output matrix and the loss for one microbatch."""
    m = job.model
    backward = 1.0 if job.frozen else 2.0
    flops = 2 * (1 + backward) * job.tokens * m.d_model * m.vocab / job.tensor
    rows = c.softmax * 4 * job.tokens * m.vocab / job.tensor
    return flops / (job.chip.matmul_flops() * c.matmul) + rows / job.chip.memory_bandwidth


def _seconds(
    job: Job, c: Constants, kind: str, payload: float, size: float, stride: float = 1.0
) -> float:
    """A collective at the bandwidth and latency that software reaches."""
    whole = max(1, round(size))
    stride = max(1, round(stride))
    ideal = collective_seconds(kind, payload, whole, job.chip, job.fast, stride)
    waits = collective_seconds(kind, 1e-9, whole, job.chip, job.fast, stride)
    return (ideal - waits) / c.link + waits * c.latency


def _communication(job: Job, c: Constants, compute: float) -> dict[str, float]:
    """Exposed seconds of the collectives inside one microbatch."""
    m = job.model
    per_stage = m.layers / job.pipeline
    repeat = 1.5 if job.remat == "full" else 1.0
    stream = 2 * job.tokens * m.d_model
    terms = {}
    one = _seconds(job, c, "all-reduce", stream, job.tensor)
    terms["tensor"] = 4 * repeat * one * per_stage * c.tensor_exposed
    width = 2 * m.n_kv_heads * m.head_dim if m.latent is None else m.latent.kv_rank
    keys = 2 * width * job.microbatch * job.sequence / job.tensor
    one = _seconds(job, c, "all-gather", keys, job.context, job.tensor)
    terms["context"] = 3 * one * per_stage * c.context_exposed
    if m.moe_count and job.expert > 1:
        sent = 2 * job.tokens * (m.expert_latent or m.d_model) / job.tensor
        hosts = job.expert * job.tensor / job.fast
        inside = min(job.expert, max(1, job.fast // job.tensor))
        one = _seconds(job, c, "all-to-all", sent * m.top_k, inside, job.tensor)
        if hosts > 1:  # a token crosses the network once per host that holds its experts
            away = sent * min(m.top_k, hosts) * (1 - 1 / hosts)
            one += away / job.chip.network_bandwidth / c.link
        share = m.moe_count / job.pipeline
        terms["expert"] = 4 * repeat * one * share * c.expert_exposed
    if job.pipeline > 1:
        hop = stream / (job.tensor if job.sequence_parallel else 1)
        chunks = job.virtual_stages
        one = _seconds(job, c, "collective-permute", hop, job.pipeline, job.tensor * job.context)
        terms["pipeline"] = 2 * chunks * one * c.pipeline_exposed
    terms["fsdp"] = _gathers(job, c, compute)
    return terms


def _gathers(job: Job, c: Constants, compute: float) -> float:
    """Exposed seconds of ZeRO-3 gathers and gradient scatters in one microbatch."""
    if job.fsdp <= 1 or job.zero < 2:
        return 0.0
    gather = scatter = 0.0
    for params, inside in zip(job.local_parts(), (1, job.expert), strict=True):
        size, stride = job.fsdp / inside, job.tensor * job.context * inside
        gather += _seconds(job, c, "all-gather", 2 * params, size, stride)
        scatter += _seconds(job, c, "reduce-scatter", 2 * params, size, stride)
    gathers = 2 * gather if job.zero >= 3 else gather / job.num_microbatches
    total = gathers + scatter
    hidden = total * (1 - c.fsdp_exposed)
    return total * c.fsdp_exposed + max(0.0, hidden - 0.9 * compute)


def _reduction(job: Job, c: Constants, compute: float) -> float:
    """Exposed seconds of the gradient reduction between replicas, once a step."""
    own = job.fsdp if job.zero >= 2 else 1  # ZeRO-1 reduces whole gradients over all replicas
    groups = job.replicas * job.context / own
    if groups <= 1.01:
        return 0.0
    shared, routed = job.local_parts()
    local = shared / own + routed / max(1.0, own / job.expert)
    if job.frozen:
        local *= 0.01
    stride = job.tensor * own
    if job.slices > 1:
        ring = 2 * (job.slices - 1) / job.slices * 2 * local / job.chip.network_bandwidth
        total = ring / c.link + job.chip.network_latency * c.latency
    else:
        scatter = _seconds(job, c, "reduce-scatter", job.gradient_bytes * local, groups, stride)
        total = scatter + _seconds(job, c, "all-gather", 2 * local, groups, stride)
    hidden = total * (1 - c.data_exposed)
    return total * c.data_exposed + max(0.0, hidden - 0.6 * compute)


def _update(job: Job, c: Constants) -> tuple[float, float]:
    """(optimizer, offload) seconds per step."""
    trained = 0.01 if job.frozen else 1.0
    local, state = job.local_params() * trained, job.shard_params() * trained
    if job.offload:
        host = state * 28 / 18e9  # host Adam streams 28 bytes per parameter, 8 chips share it
        copies = state * 6 / job.chip.host_bandwidth
        return 0.0, host + copies
    moved = 4 * c.state_passes * state + 4 * local * (1 if job.fsdp <= 1 else 0)
    return moved / job.chip.memory_bandwidth + 2e-3, 0.0
