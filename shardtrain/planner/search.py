"""Search over layouts for a described model: all that could run, what fits, which is fastest.

Purely analytic: thousands of layouts a second, no devices, no compiling. Every layout that is
rejected keeps its reason, every ranked one what it spends its time on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from shardtrain.errors import StrategyError
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
    for job, options in jobs(model, machine, global_batch, sequence, space):
        reason = invalid(job, global_batch)
        if reason:
            pruned.append(Pruned(options, reason))
            continue
        memory = job_memory(job)
        room = USABLE * machine.chip.memory
        if memory.total > room:
            pruned.append(_too_big(job, options, memory, room))
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


def _too_big(job: Job, options: dict[str, Any], memory: Memory, room: float) -> Pruned:
    """The reason with the largest classes and the one change that saves most."""
    top = sorted(memory.classes().items(), key=lambda pair: -pair[1])[:2]
    largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in top)
    changes = {"remat=full": job.replace(remat="full"), "offload=true": job.replace(offload=True)}
    saved = {name: memory.total - job_memory(other).total for name, other in changes.items()}
    name = max(saved, key=lambda key: saved[key])
    remedy = f"; {name} saves {saved[name] / 1e9:.1f}" if saved[name] > 0 else ""
    reason = f"needs {memory.total / 1e9:.1f} GB, device has {room / 1e9:.1f} ({largest}){remedy}"
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
    grown = machine
    for _ in range(6 if machine.chip.kind != "cpu" else 0):
        grown = _doubled(grown)
        if any(_fits(model, grown, global_batch, sequence, space)):
            return f"{told}; {grown} has a layout that fits"
    for shorter in (sequence // 2, sequence // 4, sequence // 8):
        if any(_fits(model, machine, global_batch, shorter, space)):
            return f"{told}; a sequence of {shorter} has a layout that fits"
    return f"{told}; use chips with more memory"


def _doubled(machine: Hardware) -> Hardware:
    """Twice the hosts, or a TPU slice twice as long in its shortest dim."""
    sizes = list(machine.topology)
    where = sizes.index(min(sizes)) if machine.chip.kind == "tpu" else 0
    sizes[where] *= 2
    return Hardware(machine.chip, tuple(sizes))


def _fits(
    model: Model, machine: Hardware, global_batch: int, sequence: int, space: Space
) -> Iterator[bool]:
    room = USABLE * machine.chip.memory
    for job, _ in jobs(model, machine, global_batch, sequence, space):
        yield not invalid(job, global_batch) and job_memory(job).total <= room
