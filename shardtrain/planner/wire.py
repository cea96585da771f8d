"""Bytes one chip sends per step, by mesh axis, in closed form (the volumes behind `time`)."""

from shardtrain.planner.job import Job


def axis_bytes(job: Job) -> dict[str, float]:
    """Mesh axis -> bytes one chip sends in a step (ring forms, hidden or not).

    Args:
        job: what is trained on what.

    Example:
        >>> from shardtrain.hardware import chip
        >>> from shardtrain.planner.catalogue import get
        >>> job = Job(get("llama3-8b"), chip("h100"), 8, 8192, fsdp=8, zero=3)
        >>> round(axis_bytes(job)["fsdp"] / 1e9, 1)  # three times 16 GB of weights, 7/8 of them
        42.2
    """
    m, repeat = job.model, 1.5 if job.remat == "full" else 1.0
    blocks, micro = m.layers / job.pipeline, job.num_microbatches
    stream = 2 * job.tokens * m.d_model
    width = 2 * m.n_kv_heads * m.head_dim if m.latent is None else m.latent.kv_rank
    keys = 2 * width * job.microbatch * job.sequence / job.tensor
    routed = 2 * job.tokens * (m.expert_latent or m.d_model) * m.top_k / job.tensor
    hop = stream / (job.tensor if job.sequence_parallel else 1)
    found = {
        "tensor": 4 * repeat * blocks * micro * 2 * stream * _share(job.tensor),
        "context": 3 * blocks * micro * keys * _share(job.context),
        "expert": 4 * repeat * m.moe_count / job.pipeline * micro * routed * _share(job.expert),
        "pipeline": 2 * job.virtual_stages * micro * hop if job.pipeline > 1 else 0.0,
    }
    return found | _gradients(job)


def _share(size: float) -> float:
    return (size - 1) / size


def _gradients(job: Job) -> dict[str, float]:
    """What parameters and gradients send over `fsdp` and `data`."""
    found = {"fsdp": 0.0, "data": 0.0}
    if job.fsdp > 1 and job.zero >= 2:
        times = 3 * job.num_microbatches if job.zero >= 3 else 1 + job.num_microbatches
        for params, inside in zip(job.local_parts(), (1, job.expert), strict=True):
            found["fsdp"] += times * 2 * params * _share(max(1.0, job.fsdp / inside))
    own = job.fsdp if job.zero >= 2 else 1
    groups = job.replicas * job.context / own
    if groups > 1.01:
        shared, routed = job.local_parts()
        local = shared / own + routed / max(1.0, own / job.expert)
        name = "fsdp" if job.fsdp > 1 and own == 1 else "data"
        found[name] += (job.gradient_bytes + 2) * local * _share(groups)
    return found
