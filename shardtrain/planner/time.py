"""Seconds of one training step, term by term, from a `Job`.

Everything is counted per chip: FLOPs of each kind of operation over the rate that operation
reaches on that chip and dtype, bytes over memory bandwidth, collectives over the links they cross
(`topology.py`), the pipeline bubble, the optimizer. `Constants` holds the few rates and overlaps
that no datasheet gives; their values are fitted on published runs and stored in
`data/calibration.json`.
"""

import math

from shardtrain.planner.job import Job
from shardtrain.planner.time_communication import communication, reduction
from shardtrain.planner.time_constants import Constants

TERMS = (
    "matmul", "attention", "elementwise", "logits", "recompute", "launch", "tensor", "context",
    "expert", "fsdp", "pipeline", "bubble", "data", "optimizer", "offload", "scale",
)  # fmt: skip


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
    exposed = communication(job, c, sum(micro.values()))
    count = job.num_microbatches
    terms = {name: seconds * count for name, seconds in (micro | exposed).items()}
    terms["bubble"] = sum(terms.values()) * job.bubble_fraction
    last = sum(micro.values())
    terms["data"] = reduction(job, c, last)
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
    work = job.flops_scale
    return {
        "matmul": work * linear * (1 + backward) * blocks,
        "attention": work * (attention_forward + attention_backward) * blocks,
        "elementwise": job.activation_scale * elementwise * blocks,
        "logits": work * logits * (1 + m.mtp),
        "recompute": work * again * blocks,
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


def _update(job: Job, c: Constants) -> tuple[float, float]:
    """(optimizer, offload) seconds per step."""
    trained = 0.01 if job.frozen else 1.0
    local, state = job.local_params() * trained, job.shard_params() * trained
    if job.offload:
        host = state * 28 / 18e9  # host Adam streams 28 bytes per parameter, 8 chips share it
        copies = state * 6 / job.chip.host_bandwidth
        return 0.0, host + copies + 2e-3
    moved = 4 * c.state_passes * state + 4 * local * (1 if job.fsdp <= 1 else 0)
    return moved / job.chip.memory_bandwidth + 2e-3, 0.0
