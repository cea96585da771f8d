"""Search over layouts for a described model: all that could run, what fits, which is fastest.

Purely analytic: thousands of layouts a second, no devices, no compiling. Every layout that is
rejected keeps its reason, every ranked one what it spends its time on.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from shardtrain.errors import StrategyError
from shardtrain.hardware import Hardware, hardware
from shardtrain.planner.calibration import constants
from shardtrain.planner.catalogue import Model, get
from shardtrain.planner.job import Job
from shardtrain.planner.memory import Memory, job_memory
from shardtrain.planner.time import step_terms
from shardtrain.strategy import Strategy

USABLE = 1.0
"""Share of the printed memory that a plan may fill: parts sold as 80 GB hold nearly 80 GiB, so
filling 80e9 bytes leaves 6% for fragmentation."""
MOST_TOKENS = 2**17
"""Tokens in a microbatch of one replica beyond which nothing gets faster."""


@dataclass(frozen=True)
class Candidate:
    """One layout with its prediction.

    Attributes:
        strategy: the layout.
        step_time: seconds per step.
        memory: bytes per device by class.
        terms: named seconds that sum to `step_time`.
        mfu: model FLOPs over the bf16 peak.
        reason: what it spends its time on, against the best.
    """

    strategy: Strategy
    step_time: float
    memory: Memory
    terms: Mapping[str, float]
    mfu: float
    reason: str = ""


@dataclass(frozen=True)
class Pruned:
    """A layout that cannot run, and why."""

    strategy: Mapping[str, Any]
    reason: str
    shortfall: float = 0.0


@dataclass(frozen=True)
class Layouts:
    """What a search found.

    Attributes:
        ranked: layouts that fit, fastest first.
        pruned: layouts that do not, with the reason.
        nearest: the layout that lacks the least memory, when nothing fits.
        advice: the cheapest change when nothing fits.
    """

    hardware: Hardware
    ranked: tuple[Candidate, ...]
    pruned: tuple[Pruned, ...]
    nearest: Pruned | None = None
    advice: str = ""

    @property
    def best(self) -> Candidate:
        """The fastest layout that fits.

        Raises:
            StrategyError: nothing fits; the message has the cheapest change.
        """
        if not self.ranked:
            raise StrategyError(f"no layout fits {self.hardware}: {self.advice}")
        return self.ranked[0]

    def ties(self, error: float = 0.05) -> tuple[Candidate, ...]:
        """Layouts that the model's error cannot tell from the best."""
        limit = self.best.step_time * (1 + error)
        return tuple(one for one in self.ranked if one.step_time <= limit)

    def __rich__(self) -> Table:
        table = Table("strategy", "step s", "MFU", "GB", "why", title=str(self.hardware))
        for one in self.ranked[:10]:
            gb = f"{one.memory.total / 1e9:.1f}"
            table.add_row(
                str(one.strategy), f"{one.step_time:.3f}", f"{one.mfu:.1%}", gb, one.reason
            )
        return table


@dataclass(frozen=True)
class Space:
    """What a search tries; every field is a list of values.

    Attributes:
        tensor: tensor sizes; empty: powers of two up to the fast domain (at most 16).
        pipeline: stages; empty: divisors of the layer count up to 64.
        context: context sizes; empty: 1, and 2 to 8 from 32k tokens on.
        expert: expert sizes; empty: 1, or powers of two that divide the experts.
        zero: sharding levels.
        remat: what is recomputed.
        precision: compute dtype.
        microbatch: sequences per model replica at a time; empty: divisors of its share.
        offload: whether the optimizer state lives on the host.
        schedule: pipeline schedules.
        virtual_stages: chunks per stage of an interleaved schedule.
    """

    tensor: Sequence[int] = ()
    pipeline: Sequence[int] = ()
    context: Sequence[int] = ()
    expert: Sequence[int] = ()
    zero: Sequence[int] = (1, 3)
    remat: Sequence[str] = ("none", "dots", "full")
    precision: Sequence[str] = ("bf16",)
    microbatch: Sequence[int] = ()
    offload: Sequence[bool] = (False, True)
    schedule: Sequence[str] = ("1f1b", "interleaved")
    virtual_stages: Sequence[int] = field(default=(2, 4))


def search_layouts(
    model_description: str | Model,
    hardware_: str | Hardware,
    global_batch: int,
    sequence: int,
    space: Space | None = None,
) -> Layouts:
    """Rank all layouts of a model on some chips.

    Args:
        model_description: catalogue name or `Model`.
        hardware_: chips.
        global_batch: sequences per step.
        sequence: tokens per sequence.
        space: what to try; None: the defaults of `Space`.

    Example:
        >>> found = search_layouts("llama3-8b", "h100:1x8", 64, 8192)
        >>> found.best.memory.total <= 80e9
        True
    """
    model = get(model_description) if isinstance(model_description, str) else model_description
    machine = hardware(hardware_)
    space = space or Space()
    ranked: list[Candidate] = []
    pruned: list[Pruned] = []
    for job, options in _jobs(model, machine, global_batch, sequence, space):
        reason = _invalid(job, global_batch)
        if reason:
            pruned.append(Pruned(options, reason))
            continue
        memory = job_memory(job)
        room = USABLE * machine.chip.memory
        if memory.total > room:
            pruned.append(_too_big(options, memory, room))
            continue
        terms = step_terms(job, constants())
        step = sum(terms.values())
        useful = job.step_tokens / job.chips * model.flops_per_token(sequence)
        mfu = useful / (step * machine.chip.peak_flops())
        ranked.append(Candidate(Strategy(**options), step, memory, terms, mfu))
    ranked.sort(key=lambda one: one.step_time)
    best = ranked[0] if ranked else None
    explained = tuple(_explain(one, best) for one in ranked)
    nearest = None
    if not ranked:
        nearest = min((p for p in pruned if p.shortfall), key=lambda p: p.shortfall, default=None)
    advice = ""
    if not ranked:
        advice = _advice(model, machine, global_batch, sequence, space, nearest)
    return Layouts(machine, explained, tuple(pruned), nearest, advice)


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


def _jobs(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every combination whose axis sizes multiply to the chips."""
    chips = machine.chip_count
    fast = min(16, machine.domain_size)
    tensors = space.tensor or _powers(fast)
    pipelines = space.pipeline or [p for p in _divisors(model.layers) if p <= 64]
    contexts = space.context or ([1, 2, 4, 8] if sequence >= 32768 else [1])
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
        schedules = [(s, v) for s in space.schedule
                     for v in (space.virtual_stages if s == "interleaved" else (1,))]  # fmt: skip
    micros = space.microbatch or _microbatches(global_batch // replicas, sequence // context)
    micros = [m for m in micros if m == 1 or m * replicas <= global_batch]
    shards = _shards(machine, replicas, expert, tensor * context)
    for shard, zero, micro, remat, precision, offload, (schedule, virtual) in itertools.product(
        shards, space.zero, micros, space.remat, space.precision, space.offload, schedules
    ):
        if shard == 1 and zero != space.zero[0]:
            continue  # nothing to shard: the levels are one layout
        parts = max(1, global_batch // (micro * replicas))
        options = {
            "data": replicas // shard, "fsdp": shard // expert, "tensor": tensor,
            "pipeline": pipeline, "context": context, "expert": expert, "zero": zero,
            "num_microbatches": parts, "schedule": schedule, "virtual_stages": virtual,
            "remat": remat, "sequence_parallel": tensor > 1, "precision": precision,
            "equal_microbatches": parts > 1, "offload": offload,
        }  # fmt: skip
        kept = {"none": "none", "full": "full"}.get(remat, "selective")
        yield Job(
            model, machine.chip, machine.chip_count, sequence, micro, parts, tensor, pipeline,
            context, expert, shard, zero, virtual, schedule, kept, precision, tensor > 1,
            offload=offload, domain=machine.domain_size,
        ), options  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _microbatches(share: int, sequence: int) -> list[int]:
    """One, and up to ten larger divisors of a replica's share of the batch."""
    sizes = [k for k in _divisors(max(share, 1)) if k == 1 or k * sequence <= MOST_TOKENS]
    picked = sizes[:: max(1, -(-len(sizes) // 10))]
    return sorted({*picked, sizes[-1]})


def _shards(machine: Hardware, replicas: int, expert: int, inside: int) -> list[int]:
    """Sizes of the sharding group: all replicas, or those within the fast links (HSDP)."""
    near = machine.domain_size // inside
    sizes = {replicas}
    if near > 1 and replicas % near == 0 and near % expert == 0:
        sizes.add(near)
    return sorted(sizes)


def _invalid(job: Job, global_batch: int) -> str:
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
    if m.layers % (job.pipeline * job.virtual_stages):
        stages = f"{job.pipeline} stages x {job.virtual_stages}"
        return f"{m.layers} layers are not divisible by {stages}"
    if job.schedule == "interleaved" and job.num_microbatches % job.pipeline:
        return f"interleaved needs microbatches ({job.num_microbatches:.0f}) divisible by stages"
    if job.sequence % (job.context * job.tensor):
        return f"sequence {job.sequence} is not divisible by context x tensor"
    if m.experts and m.experts % job.expert:
        return f"{m.experts} experts are not divisible by expert={job.expert}"
    return ""


def _too_big(options: dict[str, Any], memory: Memory, room: float) -> Pruned:
    top = sorted(memory.classes().items(), key=lambda pair: -pair[1])[:2]
    largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in top)
    reason = f"needs {memory.total / 1e9:.1f} GB, device has {room / 1e9:.1f} usable ({largest})"
    return Pruned(options, reason, memory.total - room)


def _explain(one: Candidate, best: Candidate | None) -> Candidate:
    """The same candidate with its reason."""
    top = sorted(one.terms.items(), key=lambda pair: -pair[1])[:3]
    share = ", ".join(f"{name} {seconds / one.step_time:.0%}" for name, seconds in top)
    if best is None or one is best:
        reason = f"fastest: {share}"
    else:
        worse = {name: one.terms[name] - best.terms[name] for name in one.terms}
        name = max(worse, key=lambda key: worse[key])
        slower = one.step_time / best.step_time - 1
        reason = f"{slower:.1%} slower: {name} +{worse[name]:.3g} s ({share})"
    return Candidate(one.strategy, one.step_time, one.memory, one.terms, one.mfu, reason)


def _advice(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space,
    nearest: Pruned | None,
) -> str:  # fmt: skip
    """The cheapest change that makes something fit: fewest more hosts, or a shorter sequence."""
    if nearest is None:
        return "no combination of axis sizes is valid; see the reasons of the pruned layouts"
    told = f"the closest layout {nearest.reason}"
    if machine.chip.kind == "gpu":
        for more in (2, 4, 8, 16, 32, 64):
            grown = Hardware(machine.chip, (machine.topology[0] * more, *machine.topology[1:]))
            if any(_fits(model, grown, global_batch, sequence, space)):
                return f"{told}; {grown} has a layout that fits"
    for shorter in (sequence // 2, sequence // 4, sequence // 8):
        if any(_fits(model, machine, global_batch, shorter, space)):
            return f"{told}; a sequence of {shorter} has a layout that fits"
    return f"{told}; use chips with more memory"


def _fits(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space
) -> Iterator[bool]:
    room = USABLE * machine.chip.memory
    for job, _ in _jobs(model, machine, global_batch, sequence, space):
        yield not _invalid(job, global_batch) and job_memory(job).total <= room
