"""Prove that a timetable computes the whole step: every task once, every input there in time.

Imports no JAX.
"""

from shardtrain.errors import ScheduleError
from shardtrain.pipeline.orders import predecessors
from shardtrain.pipeline.schedule_table import allocate, lifetimes
from shardtrain.pipeline.tasks import KINDS, Task, Timetable


def validate(table: Timetable) -> None:
    """Check a timetable completely.

    Args:
        table: the timetable to prove.

    Raises:
        ScheduleError: a task is missing, doubled, out of range, collides with another in its slot,
            or reads something that has not been computed or has not arrived; a buffer row
            would hold two values. The error names the task, its tick and its stage.
    """
    known = _unique(table)
    _complete(table, known)
    _dependencies(table, known)
    _buffers(table)


def _unique(table: Timetable) -> dict[tuple[str, int, int], Task]:
    known: dict[tuple[str, int, int], Task] = {}
    slots: dict[tuple[int, int, str], Task] = {}
    limits = {
        "stage": table.num_stages,
        "microbatch": table.num_microbatches,
        "virtual_stage": table.virtual_stages,
    }
    for task in table.tasks:
        for field, limit in limits.items():
            if not 0 <= getattr(task, field) < limit:
                raise ScheduleError(
                    f"schedule {table.name!r}: {task}: {field} must be in 0..{limit - 1}"
                )
        if task.kind not in KINDS or task.tick < 0:
            raise ScheduleError(f"schedule {table.name!r}: {task}: no such slot or tick")
        key = (task.kind, table.chunk(task), task.microbatch)
        if key in known:
            raise ScheduleError(f"schedule {table.name!r}: {task} repeats {known[key]}")
        slot = (task.tick, task.stage, task.kind)
        if slot in slots:
            raise ScheduleError(
                f"schedule {table.name!r}: {task} needs the same slot as {slots[slot]}"
            )
        known[key] = slots[slot] = task
    return known


def _complete(table: Timetable, known: dict[tuple[str, int, int], Task]) -> None:
    kinds = KINDS if table.splits_weight else KINDS[:2]
    expected = len(kinds) * table.num_chunks * table.num_microbatches
    missing = [
        f"{kind} of microbatch {i}, virtual stage {k // table.num_stages} "
        f"on stage {k % table.num_stages}"
        for kind in kinds
        for k in range(table.num_chunks)
        for i in range(table.num_microbatches)
        if (kind, k, i) not in known
    ]
    if missing:
        raise ScheduleError(
            f"schedule {table.name!r} lacks {len(missing)} of {expected} tasks, "
            f"first: {missing[0]}. "
            "Every microbatch needs F and B (and W, if any has it) on every virtual stage."
        )


def _dependencies(table: Timetable, known: dict[tuple[str, int, int], Task]) -> None:
    for task in table.tasks:
        for kind, chunk, gap in predecessors(task.kind, table.chunk(task), table.num_chunks):
            source = known[kind, chunk, task.microbatch]
            if source.tick + gap > task.tick:
                travel = "one tick later, after the send" if gap else "in the same tick"
                raise ScheduleError(
                    f"schedule {table.name!r}: {task} reads the result of {source}, which is there "
                    f"{travel} at the earliest. Move one of them."
                )


def _buffers(table: Timetable) -> None:
    """Prove the register allocation: no two values share a row while both are alive."""
    for name, lives in lifetimes(table).items():
        rows, _ = allocate(lives)
        busy: dict[tuple[int, int], int] = {}
        for life in sorted(lives, key=lambda life: life.start):
            row = (life.stage, rows[life.microbatch, life.chunk])
            assert busy.get(row, -1) < life.start, f"{name} row {row} holds two values"
            busy[row] = life.stop
