"""The order in which each stage does its work, and the rule that turns orders into ticks.

An *order* is one list of `Op` per stage. `lockstep_orders` are the orders of the schedules that
shardtrain runs; `mpmd_orders` are the classic ones of a runtime in which every stage is its own
program, for comparison (`mpmd.simulate`). `place` gives each op the earliest tick its order
and its inputs allow.

Sources: GPipe arXiv:1811.06965; 1F1B and interleaved 1F1B arXiv:2104.04473 section 2.2; zero
bubble (ZB-H1) arXiv:2401.10241 section 2.
"""

from shardtrain.errors import ScheduleError
from shardtrain.pipeline.tasks import KINDS, Op, Task

Orders = list[list[Op]]


def _chunked(num_stages: int, num_microbatches: int, virtual_stages: int) -> list[tuple[int, int]]:
    """(microbatch, virtual stage) in forward order: groups of `num_stages` microbatches.

    Within a group every virtual stage takes the whole group in turn. A last group smaller than
    `num_stages` keeps its length (microbatch -1 marks the hole), so that a microbatch comes back to
    stage 0 exactly when the group before it has left.
    """
    steps = []
    for start in range(0, num_microbatches, num_stages):
        group = [i if i < num_microbatches else -1 for i in range(start, start + num_stages)]
        if virtual_stages == 1:
            group = [i for i in group if i >= 0]
        steps += [(i, v) for v in range(virtual_stages) for i in group]
    return steps


def _merge(
    forward: list[tuple[int, int]], backward: list[tuple[int, int]], warmup: int, delay: int | None
) -> list[Op]:
    """`warmup` forwards, then backward and forward in turn, then the remaining backwards.

    `delay` is how many backwards a weight gradient waits (None: no W).
    """
    order = [Op("F", *step) for step in forward[:warmup]]
    rest = forward[warmup:]
    for n, step in enumerate(backward):
        order.append(Op("B", *step))
        if delay is not None and n >= delay:
            order.append(Op("W", *backward[n - delay]))
        order += [Op("F", *step) for step in rest[n : n + 1]]
    if delay:
        order += [Op("W", *step) for step in backward[-delay:]]
    return [op for op in order if op.microbatch >= 0]


def lockstep_orders(name: str, p: int, m: int, v: int) -> Orders:
    """Orders of the schedules as one SPMD program runs them.

    A microbatch needs `2 * (p - s) - 1` ticks from its forward on stage `s` to its backward
    there, one forward per tick: that many forwards come before the first backward.
    """
    steps = _chunked(p, m, v)
    back = [(i, v - 1 - k) for i, k in steps]
    orders = []
    for s in range(p):
        warmup = len(steps) if name == "gpipe" else (v - 1) * p + 2 * (p - s) - 1
        orders.append(_merge(steps, back, warmup, s if name == "zero-bubble" else None))
    return orders


def mpmd_orders(name: str, p: int, m: int, v: int) -> Orders:
    """Orders of the same schedules where stages are separate programs (their papers' form)."""
    steps = _chunked(p, m, v)
    back = [(i, v - 1 - k) for i, k in steps]
    orders = []
    for s in range(p):
        classic = p - s if v == 1 else (v - 1) * p + 2 * (p - s) - 1
        warmup = len(steps) if name == "gpipe" else classic
        orders.append(_merge(steps, back, warmup, s if name == "zero-bubble" else None))
    return orders


def predecessors(kind: str, chunk: int, num_chunks: int) -> list[tuple[str, int, int]]:
    """What a task of `kind` on `chunk` reads: (kind, chunk, ticks that must lie between).

    A neighbour's result travels at the end of its tick, so it is there one tick later; results of
    the same stage can be read by a later slot of the same tick.
    """
    if kind == "F":
        return [("F", chunk - 1, 1)] if chunk else []
    if kind == "W":
        return [("B", chunk, 0)]
    own = [("F", chunk, 0)]
    return [*own, ("B", chunk + 1, 1)] if chunk < num_chunks - 1 else own


def place(orders: Orders, virtual_stages: int) -> tuple[Task, ...]:
    """Give every op the earliest tick its stage's order and its inputs allow.

    Raises:
        ScheduleError: the orders wait for each other (a deadlock) or for a task nobody does.
    """
    p = len(orders)
    done: dict[tuple[str, int, int], int] = {}
    tasks: list[Task] = []
    position, last = [0] * p, [(0, -1)] * p  # last = (tick, slot) used on each stage
    moved = True
    while moved:
        moved = False
        for s, order in enumerate(orders):
            while position[s] < len(order):
                op = order[position[s]]
                chunk = op.virtual_stage * p + s
                needs = predecessors(op.kind, chunk, p * virtual_stages)
                keys = [(kind, k, op.microbatch) for kind, k, _ in needs]
                if not all(key in done for key in keys):
                    break
                slot = KINDS.index(op.kind)
                tick = last[s][0] + (slot <= last[s][1])
                tick = max([tick, *(done[key] + n[2] for key, n in zip(keys, needs, strict=True))])
                done[op.kind, chunk, op.microbatch] = tick
                tasks.append(Task(tick, s, *op))
                last[s], moved, position[s] = (tick, slot), True, position[s] + 1
    _refuse_deadlock(orders, position)
    return tuple(sorted(tasks, key=lambda t: (t.tick, t.stage, KINDS.index(t.kind))))


def _refuse_deadlock(orders: Orders, position: list[int]) -> None:
    stuck = [
        (s, order[n])
        for s, (order, n) in enumerate(zip(orders, position, strict=True))
        if n < len(order)
    ]
    if stuck:
        waits = "; ".join(
            f"stage {s} at {op.kind} of microbatch {op.microbatch}, "
            f"virtual stage {op.virtual_stage}"
            for s, op in stuck
        )
        raise ScheduleError(
            f"the stages' orders wait for each other or for a task that no stage does: {waits}. "
            "Reorder them, or add the missing task."
        )
