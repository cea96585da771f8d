"""Seconds of a step's collectives that compute does not hide."""

from shardtrain.planner.job import Job
from shardtrain.planner.time_constants import Constants
from shardtrain.planner.topology import collective_seconds


def _seconds(
    job: Job, c: Constants, kind: str, payload: float, size: float, stride: float = 1.0
) -> float:
    """A collective at the bandwidth and latency that software reaches."""
    whole = max(1, round(size))
    stride = max(1, round(stride))
    ideal = collective_seconds(kind, payload, whole, job.chip, job.fast, stride)
    waits = collective_seconds(kind, 1e-9, whole, job.chip, job.fast, stride)
    return (ideal - waits) / c.link + waits * c.latency


def communication(job: Job, c: Constants, compute: float) -> dict[str, float]:
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


def reduction(job: Job, c: Constants, compute: float) -> float:
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
