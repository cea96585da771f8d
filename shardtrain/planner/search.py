"""Search over layouts for a described model: all that could run, what fits, which is fastest.

Purely analytic: thousands of layouts a second, no devices, no compiling. Every layout that is
rejected keeps its reason, every ranked one what it spends its time on.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from shardtrain.errors import StrategyError, suggest
from shardtrain.hardware import Hardware, hardware
from shardtrain.planner.calibration import constants
from shardtrain.planner.catalogue import Model, get
from shardtrain.planner.job import Job
from shardtrain.planner.memory import Memory, job_memory
from shardtrain.planner.search_space import Space, invalid, jobs
from shardtrain.planner.time import step_terms
from shardtrain.strategy import Strategy

USABLE = 1.0
"""Share of the printed memory that a plan may fill: parts sold as 80 GB hold nearly 80 GiB, so
filling 80e9 bytes leaves 6% for fragmentation."""

Adjust = Callable[[Job, dict[str, Any]], Job | str]


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
        job: what was priced.
    """

    strategy: Strategy
    step_time: float
    memory: Memory
    terms: Mapping[str, float]
    mfu: float
    reason: str = ""
    job: Job | None = field(default=None, repr=False)


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
        ranked: layouts that fit, best first.
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
        """The best layout that fits.

        Raises:
            StrategyError: nothing fits; the message has the cheapest change.
        """
        if not self.ranked:
            raise StrategyError(f"no layout fits {self.hardware}: {self.advice}")
        return self.ranked[0]

    def ties(self, error: float = 0.05) -> tuple[Candidate, ...]:
        """Layouts that the model's error cannot tell from the fastest."""
        limit = min(one.step_time for one in (self.best, *self.ranked)) * (1 + error)
        return tuple(one for one in self.ranked if one.step_time <= limit)

    def __rich__(self) -> Table:
        table = Table("strategy", "step s", "MFU", "GB", "why", title=str(self.hardware))
        for one in self.ranked[:10]:
            gb = f"{one.memory.total / 1e9:.1f}"
            table.add_row(
                str(one.strategy), f"{one.step_time:.3f}", f"{one.mfu:.1%}", gb, one.reason
            )
        return table


RANKS: dict[str, Callable[[Candidate], tuple[float, float]]] = {
    "time": lambda one: (one.step_time, one.memory.total),
    "memory": lambda one: (one.memory.total, one.step_time),
}
"""What makes one layout better than another."""


def search_layouts(
    model_description: str | Model,
    hardware_: str | Hardware,
    global_batch: int,
    sequence: int,
    space: Space | None = None,
    rank: str = "time",
    adjust: Adjust | None = None,
) -> Layouts:
    """Rank all layouts of a model on some chips.

    Args:
        model_description: catalogue name or `Model`.
        hardware_: chips.
        global_batch: sequences per step.
        sequence: tokens per sequence.
        space: what to try; None: the defaults of `Space`.
        rank: what makes one better: "time" or "memory" (of the fullest device).
        adjust: given a job and its strategy's fields, the job as it really is, or why it is not
            possible (a string).

    Raises:
        StrategyError: the rank is unknown.

    Example:
        >>> found = search_layouts("llama3-8b", "h100:1x8", 64, 8192)
        >>> found.best.memory.total <= 80e9
        True
    """
    if rank not in RANKS:
        raise StrategyError(f"rank {rank!r} is unknown; {suggest(rank, RANKS)}")
    model = get(model_description) if isinstance(model_description, str) else model_description
    machine = hardware(hardware_)
    space = space or Space()
    ranked: list[Candidate] = []
    pruned: list[Pruned] = []
    for given, options in jobs(model, machine, global_batch, sequence, space):
        job = adjust(given, options) if adjust else given
        reason = job if isinstance(job, str) else invalid(job, global_batch)
        if reason or isinstance(job, str):
            pruned.append(Pruned(options, reason))
            continue
        memory = job_memory(job)
        room = USABLE * machine.chip.memory
        if memory.total > room:
            pruned.append(_too_big(job, options, memory, room, space))
            continue
        ranked.append(_price(job, options, memory))
    ranked.sort(key=RANKS[rank])
    best = ranked[0] if ranked else None
    explained = tuple(_explain(one, best) for one in ranked)
    if ranked:
        return Layouts(machine, explained, tuple(pruned))
    nearest = min((p for p in pruned if p.shortfall), key=lambda p: p.shortfall, default=None)
    advice = _advice(model, machine, global_batch, sequence, space, nearest, adjust)
    return Layouts(machine, (), tuple(pruned), nearest, advice)


def _price(job: Job, options: dict[str, Any], memory: Memory) -> Candidate:
    """Time and MFU of a layout that fits."""
    terms = step_terms(job, constants())
    step = sum(terms.values())
    useful = job.step_tokens / job.chips * job.model.flops_per_token(job.sequence)
    mfu = job.flops_scale * useful / (step * job.chip.peak_flops())
    return Candidate(Strategy(**options), step, memory, terms, mfu, job=job)


def _too_big(
    job: Job, options: dict[str, Any], memory: Memory, room: float, space: Space
) -> Pruned:
    """The reason with the largest classes and the cheapest change that makes it fit."""
    top = sorted(memory.classes().items(), key=lambda pair: -pair[1])[:2]
    largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in top)
    remedy = cheapest_change(job, memory.total, room, space.runnable)
    reason = f"needs {memory.total / 1e9:.1f} GB, device has {room / 1e9:.1f} ({largest}){remedy}"
    return Pruned(options, reason, memory.total - room)


def cheapest_change(job: Job, total: float, room: float, runnable: bool = False) -> str:
    """`; remat=full saves 6.7 and fits`: the first of the usual changes, cheapest first, that fits.

    If none does, the one that saves most; "" if none saves anything.

    Args:
        job: what does not fit.
        total: bytes it needs.
        room: bytes a device has.
        runnable: leave out what `st.plan` does not run in this version.
    """
    changes = {}
    if job.microbatch >= 2:
        micro = f"num_microbatches={2 * job.num_microbatches:.0f}"
        halves = {"microbatch": job.microbatch / 2, "num_microbatches": 2 * job.num_microbatches}
        changes[micro] = job.replace(**halves)
    if job.fsdp > 1 and job.zero < 3:
        changes["zero=3"] = job.replace(zero=3)
    if job.remat != "full":
        changes["remat=full"] = job.replace(remat="full")
    if not (job.offload or runnable):
        changes["offload=true"] = job.replace(offload=True)
    saved = {name: total - job_memory(other).total for name, other in changes.items()}
    enough = [name for name, size in saved.items() if total - size <= room]
    if enough:
        return f"; {enough[0]} saves {saved[enough[0]] / 1e9:.1f} and fits"
    name = max(saved, key=lambda key: saved[key], default="")
    return f"; {name} saves {saved[name] / 1e9:.1f}" if name and saved[name] > 0 else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.5 else f"{1e3 * seconds:.3g} ms"


def _explain(one: Candidate, best: Candidate | None) -> Candidate:
    """The same candidate with its reason."""
    top = sorted(one.terms.items(), key=lambda pair: -pair[1])[:3]
    share = ", ".join(f"{name} {seconds / one.step_time:.0%}" for name, seconds in top)
    if best is None or one.strategy == best.strategy:
        return replace(one, reason=f"fastest: {share}")
    worse = {name: one.terms[name] - best.terms[name] for name in one.terms}
    name = max(worse, key=lambda key: worse[key])
    slower = one.step_time / best.step_time - 1
    reason = f"{slower:.1%} slower: {name} +{_seconds(worse[name])} ({share})"
    if slower < 0:
        more = (one.memory.total - best.memory.total) / 1e9
        reason = f"{-slower:.1%} faster, but {more:.1f} GB more ({share})"
    return replace(one, reason=reason)


def _advice(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space,
    nearest: Pruned | None, adjust: Adjust | None,
) -> str:  # fmt: skip
    """The cheapest change that makes something fit: a field, more hosts, a shorter sequence."""
    if nearest is None:
        return "no combination of axis sizes is valid; see the reasons of the pruned layouts"
    told = f"the closest layout, {Strategy(**nearest.strategy)}, {nearest.reason}"
    if "fits" in nearest.reason:
        return told
    grown = machine
    for _ in range(6 if machine.chip.kind != "cpu" else 0):
        grown = _doubled(grown)
        if any(_fits(model, grown, global_batch, sequence, space, adjust)):
            return f"{told}; {grown} has a layout that fits"
    for shorter in (sequence // 2, sequence // 4, sequence // 8):
        if any(_fits(model, machine, global_batch, shorter, space, adjust)):
            return f"{told}; a sequence of {shorter} has a layout that fits"
    return f"{told}; use chips with more memory"


def _doubled(machine: Hardware) -> Hardware:
    """Twice the hosts, or a TPU slice twice as long in its shortest dim."""
    sizes = list(machine.topology)
    where = sizes.index(min(sizes)) if machine.chip.kind == "tpu" else 0
    sizes[where] *= 2
    return Hardware(machine.chip, tuple(sizes))


def _fits(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space,
    adjust: Adjust | None,
) -> Iterator[bool]:  # fmt: skip
    room = USABLE * machine.chip.memory
    for given, options in jobs(model, machine, global_batch, sequence, space):
        job = adjust(given, options) if adjust else given
        if not isinstance(job, str):
            yield not invalid(job, global_batch) and job_memory(job).total <= room
