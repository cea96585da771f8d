"""One training job in numbers: model shape, chips, layout and what the software does.

The time and memory models read nothing else. Published points, search candidates and real plans
are all turned into a `Job` first.
"""

import dataclasses
from dataclasses import dataclass

from shardtrain.hardware import Chip
from shardtrain.planner.catalogue import Model


@dataclass(frozen=True)
class Job:
    """A step of training, per optimizer update.

    Attributes:
        model: the transformer's shape.
        chip: what it runs on.
        chips: how many.
        sequence: tokens per sequence.
        microbatch: sequences that one model replica processes at a time (all chips of a
            tensor x context x pipeline group together work on them).
        num_microbatches: how many of those make a step.
        tensor: chips that share each matmul.
        pipeline: stages.
        context: chips that share a sequence.
        expert: chips that share the experts.
        fsdp: chips that share parameters, gradients and optimizer state (1: nobody).
        zero: 0 to 3, what is shared over `fsdp` (or over the replicas, for 1 and 2).
        virtual_stages: model chunks per stage.
        schedule: "gpipe", "1f1b", "interleaved" or "zero-bubble".
        remat: "none", "selective" or "full".
        precision: "bf16", "fp8", "fp4", "int8" or "fp32": operands of the linear layers.
        sequence_parallel: the residual stream is sharded over `tensor`.
        slices: groups of chips that only a data-centre network joins.
        flash: attention never writes the s x s scores to memory.
        runtime_bytes: memory the software holds beyond the usual.
        logit_bytes: bytes per logit at the peak: 16-bit value, fp32 copy, gradient.
        tuned_attention: the fused kernel is written for this generation of chips.
        causal: keys a query may not see are skipped.
        frozen: the base weights get no gradient (LoRA).
        gradient_bytes: bytes per parameter of accumulated gradients.
        offload: optimizer state and update live on the host.
        offload_activations: some saved activations live on the host.
        domain: chips joined by the fast links; 0: the chip's own.
        optimizer_bytes: bytes per parameter of optimizer state beside the fp32 weights; Adam has 8.
        flops_scale: FLOPs of the traced program over those of `model`'s formula.
        activation_scale: the same for the bytes the backward pass reads.
    """

    model: Model
    chip: Chip
    chips: int
    sequence: int
    microbatch: float = 1.0
    num_microbatches: float = 1.0
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    fsdp: int = 1
    zero: int = 1
    virtual_stages: int = 1
    schedule: str = "1f1b"
    remat: str = "none"
    precision: str = "bf16"
    sequence_parallel: bool = False
    slices: int = 1
    flash: bool = True
    causal: bool = True
    frozen: bool = False
    gradient_bytes: float = 4.0
    offload: bool = False
    offload_activations: bool = False
    domain: int = 0
    runtime_bytes: float = 0.0
    logit_bytes: float = 8.0
    tuned_attention: bool = True
    optimizer_bytes: float = 8.0
    flops_scale: float = 1.0
    activation_scale: float = 1.0

    @property
    def replicas(self) -> float:
        """Groups of chips that each process their own sequences."""
        return max(1.0, self.chips / (self.tensor * self.pipeline * self.context))

    @property
    def tokens(self) -> float:
        """Tokens one tensor group sees in one microbatch (its share of the context)."""
        return self.microbatch * self.sequence / self.context

    @property
    def step_tokens(self) -> float:
        """Tokens in a step, all chips together."""
        return self.microbatch * self.num_microbatches * self.replicas * self.sequence

    @property
    def fast(self) -> int:
        """Chips joined by the fast links."""
        if self.domain:
            return min(self.domain, self.chips)
        size = self.chip.domain or max(1, self.chips // self.slices)
        return min(size, self.chips)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of the busy time of a stage: (p-1)/(v m) for 1F1B, a third for zero-bubble.

        arXiv:2104.04473 section 2.2 and arXiv:2401.10241.
        """
        if self.pipeline == 1:
            return 0.0
        chunks = self.virtual_stages if self.schedule == "interleaved" else 1
        factor = 1 / 3 if self.schedule == "zero-bubble" else 1.0
        return factor * (self.pipeline - 1) / (chunks * self.num_microbatches)

    @property
    def local_experts(self) -> float:
        """Routed experts one chip holds."""
        return max(1.0, self.model.experts / self.expert)

    def local_parts(self) -> tuple[float, float]:
        """(shared, routed expert) parameters one chip computes with, on the fullest stage."""
        m = self.model
        routed = m.moe_count * m.experts * m.expert_matmul
        table = m.vocab * m.d_model
        tables = table if m.tied or self.pipeline > 1 else 2 * table
        stage = self.tensor * self.pipeline
        shared = (m.block_matmul - routed) / stage + tables / self.tensor
        return shared, routed / (stage * self.expert)

    def local_params(self) -> float:
        """Parameters one chip computes with (before FSDP sharding), the fullest stage."""
        return sum(self.local_parts())

    def shard_params(self) -> float:
        """Parameters whose optimizer state one chip keeps; experts are already divided."""
        shared, routed = self.local_parts()
        shards = self.state_shards()
        return shared / shards + routed / max(1.0, shards / self.expert)

    def state_shards(self) -> float:
        """Chips over which optimizer state is divided."""
        if self.fsdp > 1:
            return self.fsdp * self.context
        return self.replicas * self.context if self.zero >= 1 else 1.0

    def replace(self, **changes: object) -> "Job":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
