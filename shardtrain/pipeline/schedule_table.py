"""A timetable as the dense integer table an executor scans over. Imports no JAX.

Besides *what* each stage computes in a tick, the table says *where* in its buffers: a stage keeps
the inputs of its microbatches in flight (the stash), the gradients that arrived for them, and,
with W tasks, what their weight gradient needs. Buffer rows are register-allocated: a row is taken
from the moment a value arrives until its last reader, and every buffer has one more row, the
*trash*, into which an idle slot writes.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from shardtrain.pipeline.tasks import KINDS, Kind, Task, Timetable

# Order of events inside one tick: the slots F, B and W, then arrivals from neighbours.
_F, _B, _W, _ARRIVE, _EVENTS = 0, 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Phase:
    """A run of ticks `start <= tick < stop` in which the same slots are used by some stage."""

    start: int
    stop: int
    slots: tuple[Kind, ...]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, eq=False)
class SlotTable:
    """Integer arrays `[num_ticks, num_stages]`; -1 is idle, row `*_rows` of a buffer is its trash.

    `microbatch` and `virtual_stage` hold one array per slot. `stash_row` is the row slot F fills
    (chunk 0) or reads, `backward_row` the one slot B reads, `arrival_row` where the neighbour's
    activation goes at the end of the tick. `gradient_row` is read by slot B,
    `gradient_arrival_row` filled at the end of the tick. `weight_row` is filled by slot B and
    `weight_read_row` read by slot W.
    """

    microbatch: dict[Kind, np.ndarray]
    virtual_stage: dict[Kind, np.ndarray]
    stash_row: np.ndarray
    backward_row: np.ndarray
    arrival_row: np.ndarray
    gradient_row: np.ndarray
    gradient_arrival_row: np.ndarray
    weight_row: np.ndarray
    weight_read_row: np.ndarray
    stash_rows: int
    gradient_rows: int
    weight_rows: int
    phases: tuple[Phase, ...]


def phases(table: Timetable) -> tuple[Phase, ...]:
    """Cut the timetable where the set of slots in use changes; unused ticks are dropped."""
    used: dict[int, set[Kind]] = collections.defaultdict(set)
    for task in table.tasks:
        used[task.tick].add(task.kind)
    found: list[Phase] = []
    for tick in sorted(used):
        slots = tuple(kind for kind in KINDS if kind in used[tick])
        if found and found[-1].stop == tick and found[-1].slots == slots:
            found[-1] = dataclasses.replace(found[-1], stop=tick + 1)
        else:
            found.append(Phase(tick, tick + 1, slots))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """A value of one microbatch and chunk in a stage's buffer, from event `start` to `stop`."""

    start: int
    stop: int
    stage: int
    microbatch: int
    chunk: int


def _at(task: Task, event: int) -> int:
    return task.tick * _EVENTS + event


def lifetimes(table: Timetable) -> dict[str, list[Lifetime]]:
    """When each stashed input, arrived gradient and weight-gradient residual lives."""
    tasks = {(t.kind, table.chunk(t), t.microbatch): t for t in table.tasks}
    lives: dict[str, list[Lifetime]] = {"stash": [], "gradient": [], "weight": []}
    for (kind, k, i), task in tasks.items():
        if kind != "B":
            continue
        before = tasks["F", k - 1, i] if k else None
        born = _at(before, _ARRIVE) if before else _at(tasks["F", k, i], _F)
        lives["stash"].append(Lifetime(born, _at(task, _B), task.stage, i, k))
        if k < table.num_chunks - 1:
            sender = tasks["B", k + 1, i]
            lives["gradient"].append(
                Lifetime(_at(sender, _ARRIVE), _at(task, _B), task.stage, i, k)
            )
        if ("W", k, i) in tasks:
            reader = tasks["W", k, i]
            lives["weight"].append(Lifetime(_at(task, _B), _at(reader, _W), task.stage, i, k))
    return lives


def peak(lives: Iterable[Lifetime], num_stages: int) -> tuple[int, ...]:
    """Largest number of values alive at once, per stage."""
    events = sorted(
        [(life.start, 1, life.stage) for life in lives]
        + [(life.stop + 0.5, -1, life.stage) for life in lives]
    )
    alive, most = [0] * num_stages, [0] * num_stages
    for _, change, stage in events:
        alive[stage] += change
        most[stage] = max(most[stage], alive[stage])
    return tuple(most)


def allocate(lives: list[Lifetime]) -> tuple[dict[tuple[int, int], int], int]:
    """Assign a row to every (microbatch, chunk); rows needed. Greedy is optimal for intervals."""
    rows: dict[tuple[int, int], int] = {}
    free_at: dict[int, list[int]] = collections.defaultdict(list)
    for life in sorted(lives, key=lambda life: (life.start, life.stop)):
        ends = free_at[life.stage]
        row = next((r for r, end in enumerate(ends) if end < life.start), len(ends))
        ends[row : row + 1] = [life.stop]
        rows[life.microbatch, life.chunk] = row
    return rows, max((len(ends) for ends in free_at.values()), default=0)


@functools.lru_cache(maxsize=64)
def slot_table(table: Timetable) -> SlotTable:
    """Compile a (valid) timetable to the dense form the executor scans over."""
    shape = (table.num_ticks, table.num_stages)
    grid = functools.partial(np.full, shape, dtype=np.int32)
    rows, count = {}, {}
    for name, lives in lifetimes(table).items():
        rows[name], count[name] = allocate(lives)
    microbatch = {kind: grid(-1) for kind in KINDS}
    virtual = {kind: grid(-1) for kind in KINDS}
    stash, backward, arrival = (grid(count["stash"]) for _ in range(3))
    gradient, gradient_arrival = grid(count["gradient"]), grid(count["gradient"])
    weight, weight_read = grid(count["weight"]), grid(count["weight"])
    for task in table.tasks:
        at, i, k = (task.tick, task.stage), task.microbatch, table.chunk(task)
        microbatch[task.kind][at], virtual[task.kind][at] = i, task.virtual_stage
        if task.kind == "F":
            stash[at] = rows["stash"][i, k]
            if k + 1 < table.num_chunks:
                arrival[task.tick, (task.stage + 1) % table.num_stages] = rows["stash"][i, k + 1]
        elif task.kind == "B":
            backward[at] = rows["stash"][i, k]
            gradient[at] = rows["gradient"].get((i, k), count["gradient"])
            weight[at] = rows["weight"].get((i, k), count["weight"])
            if k:
                sent_to = (task.stage - 1) % table.num_stages
                gradient_arrival[task.tick, sent_to] = rows["gradient"][i, k - 1]
        else:
            weight_read[at] = rows["weight"][i, k]
    return SlotTable(
        microbatch, virtual, stash, backward, arrival, gradient, gradient_arrival,
        weight, weight_read, count["stash"], count["gradient"], count["weight"], phases(table),
    )  # fmt: skip
