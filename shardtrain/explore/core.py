"""`st.explore`: which layout, on which chips, and why not the others."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from shardtrain.errors import ShardtrainError, StrategyError, suggest
from shardtrain.explore.choice import Choice
from shardtrain.explore.exploration import Exploration
from shardtrain.explore.ranking import RANKS, rank_choices
from shardtrain.explore.subject import Subject, catalogue_subject, module_subject
from shardtrain.hardware import Hardware
from shardtrain.hardware import hardware as find_hardware
from shardtrain.planner.catalogue_model import Model
from shardtrain.planner.search import Layouts, Pruned, search_layouts
from shardtrain.planner.search_space import Space

MOST_REFUSED = 20
"""Layouts of the user's own model that `st.plan` may refuse before the estimate is believed."""


def explore(
    model: Any,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: Any = None,
    batch: Any = None,
    hardware: str | Hardware | Sequence[str | Hardware] = "h100:1x8",
    *,
    global_batch: int | None = None,
    sequence: int | None = None,
    rank: str = "time",
    prices: float | Mapping[str, float] | None = None,
    compile_top: int = 0,
    **limits: Any,
) -> Exploration:
    """Look at every layout of a model on some chips; nothing is allocated, no device is touched.

    Mesh sizes x ZeRO level x schedule x microbatches x remat x sequence, context and expert axes x
    precision x offload, each priced by the analytic memory and time models.

    Args:
        model: a catalogue name ("llama3-8b"), a `planner` `Model`, or your own module as in
            `st.plan`; then `loss_fn`, `optimizer` and `batch` are needed too, the traced program
            replaces the formulas' FLOPs and activations, and only what `st.plan` runs is offered.
        loss_fn: as in `st.plan`.
        optimizer: as in `st.plan`; its actual state is counted.
        batch: one global batch, real or abstract.
        hardware: chips, `"h100:8x8"`; several to compare them (`rank="cost"`).
        global_batch: sequences per step, of a catalogue model.
        sequence: tokens per sequence, of a catalogue model.
        rank: "time", "memory" (of the fullest device) or "cost" (per step).
        prices: dollars per chip-hour, one number or by chip name; None: cost is in chip-seconds.
        compile_top: compile the first few with the hardware's real compiler (own models).
        **limits: values to try, by the fields of `planner.search_space.Space`:
            `tensor=(1, 2)`, `remat="full"`, `offload=False`, `precision=("bf16", "fp32")`, ...

    Raises:
        StrategyError: unknown rank or limit.
        HardwareError: unknown chips.
        ModelError: unknown catalogue name.

    Example:
        >>> import shardtrain as st
        >>> found = st.explore("llama3-8b", hardware="h100:8x8", global_batch=512, sequence=8192)
        >>> found.best.memory_bytes < 80e9
        True
    """
    started = time.perf_counter()
    if rank not in RANKS:
        raise StrategyError(f"rank {rank!r} is unknown; {suggest(rank, RANKS)}")
    own = not isinstance(model, str | Model)
    _check_arguments(own, loss_fn, optimizer, batch, global_batch, sequence, compile_top)
    space = make_space(limits, own)
    if own:
        assert loss_fn is not None
        subject = module_subject(model, loss_fn, optimizer, batch)
    else:
        subject = catalogue_subject(model, global_batch, sequence)
    several = isinstance(hardware, Sequence) and not isinstance(hardware, str)
    machines = [find_hardware(one) for one in (hardware if several else [hardware])]
    searches, rejected = [], []
    for machine in machines:
        found, refused = _search(subject, machine, space, rank)
        searches.append(found)
        rejected += refused
    choices = [
        Choice(s.hardware, one, _cost(s.hardware, one.step_time, prices))
        for s in searches for one in s.ranked
    ]  # fmt: skip
    found = Exploration(
        subject, tuple(searches), rank_choices(choices, rank), rank,
        "chip-s" if prices is None else "$", tuple(rejected), time.perf_counter() - started,
    )  # fmt: skip
    return replace(found, compiled=found.compile(compile_top)) if compile_top else found


def make_space(limits: Mapping[str, Any], runnable: bool) -> Space:
    """A `Space` from keyword limits; a single value is a list of one.

    Raises:
        StrategyError: a limit is not a field of `Space`.
    """
    known = [f.name for f in fields(Space) if f.name != "runnable"]
    for name in limits:
        if name not in known:
            raise StrategyError(f"explore has no limit {name!r}; {suggest(name, known)}")
    values = {
        name: tuple(value) if isinstance(value, list | tuple | set | range) else (value,)
        for name, value in limits.items()
    }
    return Space(**values, runnable=runnable)


def _check_arguments(
    own: bool, loss_fn: Any, optimizer: Any, batch: Any, global_batch: Any, sequence: Any, top: int
) -> None:
    """What belongs to a module and what to a catalogue model."""
    given = {"loss_fn": loss_fn, "optimizer": optimizer, "batch": batch}
    if own and (missing := [name for name, value in given.items() if value is None]):
        raise StrategyError(f"to explore your own model give {', '.join(missing)} too")
    if own and (global_batch is not None or sequence is not None):
        raise StrategyError("your own model's batch says global_batch and sequence; leave them out")
    if not own and any(value is not None for value in given.values()):
        raise StrategyError("a catalogue model takes global_batch= and sequence=, no loss or batch")
    if not own and top:
        raise StrategyError("a catalogue model has no code to compile; explore your own module")


def _search(
    subject: Subject, machine: Hardware, space: Space, rank: str
) -> tuple[Layouts, list[Pruned]]:
    """The search on one machine; the best of the user's own model has been through `st.plan`."""
    inner = "memory" if rank == "memory" else "time"
    found = search_layouts(
        subject.model, machine, subject.global_batch, subject.sequence, space, inner, subject.adjust
    )
    refused: list[Pruned] = []
    if subject.plan is None:
        return found, refused
    ranked = list(found.ranked)
    while ranked and len(refused) < MOST_REFUSED:
        try:
            subject.plan(ranked[0].strategy, str(machine))
            break
        except ShardtrainError as error:
            refused.append(Pruned(vars(ranked[0].strategy), f"st.plan: {error}"))
            ranked.pop(0)
    return replace(found, ranked=tuple(ranked)), refused


def _cost(machine: Hardware, step_time: float, prices: float | Mapping[str, float] | None) -> float:
    """Dollars of a step, or chip-seconds without prices."""
    chip_seconds = machine.chip_count * step_time
    if prices is None:
        return chip_seconds
    if isinstance(prices, Mapping):
        name = machine.chip.name
        if name not in prices:
            raise StrategyError(f"no price for {name}; prices are given for {', '.join(prices)}")
        return chip_seconds / 3600 * prices[name]
    return chip_seconds / 3600 * prices
