"""What a search tries: every layout of a model on some chips, and why some cannot run."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shardtrain.hardware import Hardware
from shardtrain.planner.catalogue import Model
from shardtrain.planner.job import Job

MOST_TOKENS = 2**17
"""Tokens in a microbatch of one replica beyond which nothing gets faster."""


@dataclass(frozen=True)
class Space:
    """What a search tries; every field is a list of values.

    Attributes:
        tensor: tensor sizes; empty: powers of two up to the fast domain (at most 16).
        pipeline: stages; empty: divisors of the layer count, with or without the embedding and
            the output matrix counted as layers, up to 64.
        context: context sizes; empty: 1, 2 for models over 100B from 8k tokens on, and 2 to 8 from
            32k tokens on.
        expert: expert sizes; empty: 1, or powers of two that divide the experts.
        zero: sharding levels; 0 is plain data parallelism.
        remat: what is recomputed.
        precision: compute dtype.
        microbatch: sequences per model replica at a time; empty: divisors of its share.
        offload: whether the optimizer state lives on the host.
        schedule: pipeline schedules.
        virtual_stages: chunks per stage of an interleaved schedule; empty: up to three of 2 to 8
            that divide a stage's layers.
        runnable: only what `st.plan` runs in this version: no offload, no sequence parallelism.
    """

    tensor: Sequence[int] = ()
    pipeline: Sequence[int] = ()
    context: Sequence[int] = ()
    expert: Sequence[int] = ()
    zero: Sequence[int] = (0, 1, 2, 3)
    remat: Sequence[str] = ("none", "dots", "full")
    precision: Sequence[str] = ("bf16",)
    microbatch: Sequence[int] = ()
    offload: Sequence[bool] = (False, True)
    schedule: Sequence[str] = ("1f1b", "interleaved")
    virtual_stages: Sequence[int] = ()
    runnable: bool = False


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


def jobs(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every combination whose axis sizes multiply to the chips."""
    chips = machine.chip_count
    fast = min(16, machine.domain_size)
    tensors = space.tensor or _powers(fast)
    pipelines = space.pipeline or _pipelines(model, space.runnable)
    contexts = space.context or _contexts(model, sequence)
    experts = space.expert or _powers(min(model.experts, 64) or 1)
    for tensor in tensors:
        for pipeline in pipelines:
            for context in contexts:
                if chips % (tensor * pipeline * context):
                    continue
                replicas = chips // (tensor * pipeline * context)
                for expert in experts:
                    if replicas % expert:
                        continue
                    yield from _variants(
                        model, machine, global_batch, sequence, space,
                        (tensor, pipeline, context, expert, replicas),
                    )  # fmt: skip


def _variants(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space,
    sizes: tuple[int, int, int, int, int],
) -> Iterator[tuple[Job, dict[str, Any]]]:  # fmt: skip
    """Sharding, microbatch, recomputation, schedule for one choice of axis sizes."""
    tensor, pipeline, context, expert, replicas = sizes
    schedules = [("1f1b", 1)]
    if pipeline > 1:
        chunks = space.virtual_stages or _chunks(model, pipeline, space.runnable)
        schedules = [(s, v) for s in space.schedule
                     for v in (chunks if s == "interleaved" else (1,))]  # fmt: skip
    micros = space.microbatch or _microbatches(global_batch // replicas, sequence // context)
    micros = [m for m in micros if m == 1 or m * replicas <= global_batch]
    shards = _shards(machine, replicas, expert, tensor * context)
    levels = _levels(shards, space.zero if expert == 1 else [z for z in space.zero if z])
    offloads = (False,) if space.runnable else space.offload
    sequence_parallel = tensor > 1 and not space.runnable
    for (shard, zero), micro, remat, precision, offload, (schedule, virtual) in itertools.product(
        levels, micros, space.remat, space.precision, offloads, schedules
    ):
        parts = max(1, global_batch // (micro * replicas))
        options = {
            "data": replicas // shard, "fsdp": shard // expert, "tensor": tensor,
            "pipeline": pipeline, "context": context, "expert": expert,
            "zero": zero if replicas > 1 else 3,
            "num_microbatches": parts, "schedule": schedule, "virtual_stages": virtual,
            "remat": remat, "sequence_parallel": sequence_parallel, "precision": precision,
            "equal_microbatches": parts > 1, "offload": offload,
        }  # fmt: skip
        kept = {"none": "none", "full": "full"}.get(remat, "selective")
        yield Job(
            model, machine.chip, machine.chip_count, sequence, micro, parts, tensor, pipeline,
            context, expert, shard, zero, virtual, schedule, kept, precision, sequence_parallel,
            offload=offload, domain=machine.domain_size,
        ), options  # fmt: skip


def layer_counts(model: Model, even: bool = False) -> tuple[int, ...]:
    """Layers that stages can share equally: the embedding and the output matrix may count as one.

    Args:
        model: shape.
        even: blocks only, as `st.plan` splits them.
    """
    return (model.layers,) if even else (model.layers, model.layers + 1, model.layers + 2)


def _pipelines(model: Model, even: bool) -> list[int]:
    found = {p for n in layer_counts(model, even) for p in _divisors(n)}
    return sorted(p for p in found if p <= min(64, model.layers))


def _contexts(model: Model, sequence: int) -> list[int]:
    if sequence >= 32768:
        return [1, 2, 4, 8]
    return [1, 2] if sequence >= 8192 and model.params > 100e9 else [1]


def _chunks(model: Model, pipeline: int, even: bool) -> list[int]:
    """Fewest, most and a middle number of chunks of 2 to 8 that a stage's layers divide into."""
    fit = [
        v for v in range(2, 9) if any(n % (pipeline * v) == 0 for n in layer_counts(model, even))
    ]
    return sorted({fit[0], fit[len(fit) // 2], fit[-1]}) if fit else [2]


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _microbatches(share: int, sequence: int) -> list[int]:
    """One, and up to ten larger divisors of a replica's share of the batch."""
    sizes = [k for k in _divisors(max(share, 1)) if k == 1 or k * sequence <= MOST_TOKENS]
    picked = sizes[:: max(1, -(-len(sizes) // 10))]
    return sorted({*picked, sizes[-1]})


def _levels(shards: list[int], zero: Sequence[int]) -> list[tuple[int, int]]:
    """(sharding group, level): level 0 shards nothing, the others over a group of at least two."""
    plain = [(1, 0)] if 0 in zero or max(shards) == 1 else []
    return plain + [(shard, level) for shard in shards for level in zero if shard > 1 and level]


def _shards(machine: Hardware, replicas: int, expert: int, inside: int) -> list[int]:
    """Sizes of the sharding group: all replicas, or those within the fast links (HSDP)."""
    near = machine.domain_size // inside
    sizes = {replicas}
    if near > 1 and replicas % near == 0 and near % expert == 0:
        sizes.add(near)
    return sorted(sizes)


def invalid(job: Job, global_batch: int) -> str:
    """Why a layout cannot run at all, or ""."""
    m = job.model
    if job.replicas * job.microbatch > global_batch:
        return f"global batch {global_batch} is less than {job.replicas:.0f} replicas"
    if global_batch % (job.replicas * job.microbatch):
        each = f"{job.replicas:.0f} replicas x {job.microbatch:.0f}"
        return f"global batch {global_batch} is not divisible by {each}"
    for size, name in ((m.n_heads, "heads"), (m.d_ff or m.expert_ff, "mlp width")):
        if size % job.tensor:
            return f"{name} {size} is not divisible by tensor={job.tensor}"
    if all(n % (job.pipeline * job.virtual_stages) for n in layer_counts(m)):
        stages = f"{job.pipeline} stages x {job.virtual_stages}"
        return f"{m.layers} layers are not divisible by {stages}"
    if job.schedule == "interleaved" and job.num_microbatches % job.pipeline:
        return f"interleaved needs microbatches ({job.num_microbatches:.0f}) divisible by stages"
    if job.sequence % (job.context * job.tensor):
        return f"sequence {job.sequence} is not divisible by context x tensor"
    if m.experts and m.experts % job.expert:
        return f"{m.experts} experts are not divisible by expert={job.expert}"
    return ""
