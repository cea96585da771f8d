"""What a runtime with one program per stage would reach: the price of one SPMD program.

Imports no JAX. Every stage works through its own order as soon as inputs are there; sends cost
nothing. This is the model in which the papers state their bubbles.
"""

import dataclasses

from shardtrain.pipeline.orders import Orders, place, predecessors
from shardtrain.pipeline.schedule_table import Lifetime, peak
from shardtrain.pipeline.tasks import KINDS, Op, SlotCosts, Timetable


@dataclasses.dataclass(frozen=True)
class Span:
    """One op of a stage and when it ran."""

    stage: int
    op: Op
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class MpmdTimeline:
    """Result of `simulate`.

    Attributes:
        time: end of the last op, in the unit of the costs.
        bubble_time: time minus the work of one stage.
        bubble_fraction: share of `time` a stage is idle.
        peak_activations: chunk inputs a stage holds at most, per stage.
        spans: every op with its start and stop.
    """

    time: float
    bubble_time: float
    bubble_fraction: float
    peak_activations: tuple[int, ...]
    spans: tuple[Span, ...]


def simulate(orders: Orders, table: Timetable, costs: SlotCosts) -> MpmdTimeline:
    """Run every stage's order as its own program.

    Args:
        orders: one list of ops per stage.
        table: the sizes (stages, microbatches, virtual stages).
        costs: time of one whole stage per microbatch.

    Raises:
        ScheduleError: the orders deadlock.
    """
    splits = any(op.kind == "W" for order in orders for op in order)
    placed = place(orders, table.virtual_stages)  # refuses deadlocks; its order is topological
    stop: dict[tuple[str, int, int], float] = {}
    free = [0.0] * table.num_stages
    spans = []
    for task in placed:
        chunk = table.chunk(task)
        needs = predecessors(task.kind, chunk, table.num_chunks)
        ready = [stop[kind, k, task.microbatch] for kind, k, _ in needs]
        start = max([free[task.stage], *ready])
        end = start + costs.of(task.kind, splits, table.virtual_stages)
        stop[task.kind, chunk, task.microbatch] = free[task.stage] = end
        spans.append(Span(task.stage, task.op, start, end))
    kinds = KINDS if splits else KINDS[:2]
    per_task = sum(costs.of(kind, splits, table.virtual_stages) for kind in kinds)
    work = per_task * table.virtual_stages * table.num_microbatches
    time = max(free)
    return MpmdTimeline(
        time, time - work, (time - work) / time, _peak(orders, splits), tuple(spans)
    )


def _peak(orders: Orders, splits: bool) -> tuple[int, ...]:
    """Inputs held: from the forward to the last op that reads them (W where there is one)."""
    lives = []
    for stage, order in enumerate(orders):
        at = {op: n for n, op in enumerate(order)}
        for op, n in at.items():
            if op.kind == "F":
                last = at[op._replace(kind="W" if splits else "B")]
                lives.append(Lifetime(n, last, stage, op.microbatch, op.virtual_stage))
    return peak(lives, len(orders))
