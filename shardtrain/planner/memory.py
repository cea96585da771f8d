"""Bytes per device of a training step, class by class, in closed form.

Model states follow ZeRO (arXiv:1910.02054), activations Korthikanti et al. (arXiv:2205.05198,
Eq. 1-6); both are in `memory_published.py`. `job_memory` puts them together for any `Job`.
"""

from dataclasses import dataclass, fields

from shardtrain.planner.job import Job
from shardtrain.planner.memory_published import activation_bytes, interleave_factor

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes per device, by class.

    Attributes:
        parameters: weights used for compute.
        gradients: accumulated gradients.
        optimizer: master copy and moments.
        activations: what the backward pass reads, for all microbatches in flight.
        logits: logits and their gradient.
        buffers: gathered weights, working space of one block, communication.
        runtime: driver, compiler and allocator overhead.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    runtime: float

    @property
    def total(self) -> float:
        """All classes together."""
        return sum(self.classes().values())

    @property
    def states(self) -> float:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    def classes(self) -> dict[str, float]:
        """Class name -> bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def in_flight(job: Job) -> float:
    """Microbatches' worth of stage activations the first stage holds."""
    if job.pipeline == 1:
        return 1.0
    if job.schedule == "gpipe":
        return max(1.0, job.num_microbatches)
    held = min(float(job.pipeline), max(1.0, job.num_microbatches))
    return held * interleave_factor(job.pipeline, job.virtual_stages)


def block_bytes(job: Job) -> float:
    """Activation bytes of one block for one microbatch when nothing is recomputed.

    Without fused attention this is Korthikanti's formula; with it the s x s scores are gone and
    the tensors that a fused block keeps are counted one by one (16-bit).
    """
    m, t, tokens = job.model, job.tensor, job.tokens
    if not job.flash and not m.experts:
        kind = "tensor+sequence" if job.sequence_parallel else "tensor"
        batch = job.microbatch / job.context
        return activation_bytes(job.sequence, batch, m.d_model, m.n_heads, t, kind)
    qk, value = m.attention_width()
    kv = 2 * m.n_kv_heads * m.head_dim if m.latent is None else qk + value
    attention = (qk + value + kv) / t * m.attention_count / m.layers
    hidden = m.dense_count * m.d_ff + m.moe_count * (m.top_k * m.expert_ff + m.shared_ff)
    routed = 2 * m.moe_count * m.top_k * (m.expert_latent or m.d_model)
    inner = (hidden * m.mlp_matrices + routed) / m.layers / t
    stream = 4 * m.d_model / (t if job.sequence_parallel else 1)
    return 2 * tokens * (attention + inner + stream)


def job_memory(job: Job) -> Memory:
    """Bytes per device of a job, the fullest stage.

    Args:
        job: what is trained on what.

    Example:
        >>> from shardtrain.hardware import chip
        >>> from shardtrain.planner.catalogue import get
        >>> job = Job(get("llama3-8b"), chip("h100"), 8, 8192, fsdp=8, zero=3, remat="full")
        >>> round(job_memory(job).states / 1e9, 2)
        18.07
    """
    m = job.model
    local, shard = job.local_params(), job.shard_params()
    trained = 0.01 if job.frozen else 1.0
    mixed = job.precision != "fp32"
    shared = job.fsdp > 1
    weights = (2.0 if mixed else 4.0) * (shard if shared and job.zero >= 3 else local)
    each = 4.0 if shared and job.zero >= 3 else job.gradient_bytes
    gradients = each * trained * (shard if shared and job.zero >= 2 else local)
    master = (4.0 if mixed else 0.0) + job.optimizer_bytes
    optimizer = 0.0 if job.offload else master * trained * shard
    split = job.tensor if job.sequence_parallel else 1
    boundary = 2 * job.tokens * m.d_model / split
    boundary *= job.activation_scale
    block = block_bytes(job) * job.activation_scale
    kept = {"full": boundary, "selective": 0.5 * (block + boundary)}.get(job.remat, block)
    if job.remat == "full" and job.offload_activations:
        kept = 0.0
    layers = m.layers / job.pipeline
    activations = kept * layers * in_flight(job)
    logits = job.activation_scale * job.logit_bytes * job.tokens * m.vocab / job.tensor
    if job.pipeline > 1:
        logits = max(0.0, logits - activations / 2)  # the last stage holds one microbatch only
    buffers = block if job.remat != "none" else 0.0
    if job.zero >= 3 and job.fsdp > 1:
        # two blocks gathered at a time; a pipeline keeps its whole stage gathered
        gathered = 2 * local / max(layers, 1) if job.pipeline == 1 else local
        buffers += 4 * gathered
    if job.pipeline > 1 and job.remat == "full":
        buffers += 0.4 * activations  # boundary tensors are held once more to send and receive
    runtime = (2.0 * GIB if job.chip.kind == "gpu" else 0.3 * GIB) + job.runtime_bytes
    return Memory(weights, gradients, optimizer, activations, logits, buffers, runtime)
