"""Pipeline schedules as data: make one by name or from a CSV file, look at it, draw it.

Imports no JAX. A schedule is a `Schedule`: a validated table of tasks (see `tasks`) in the
*lockstep* form one SPMD program runs. Which schedule to use changes only this table, never the
executor.

    >>> schedule = make_schedule("1f1b", num_stages=4, num_microbatches=8)
    >>> round(schedule.bubble_fraction, 4), schedule.peak_activations
    (0.2727, (7, 5, 3, 1))
    >>> schedule.simulate_mpmd().peak_activations
    (4, 3, 2, 1)
"""

import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING

from shardtrain.errors import ScheduleError, suggest
from shardtrain.pipeline import draw, mpmd
from shardtrain.pipeline.orders import lockstep_orders, mpmd_orders, place
from shardtrain.pipeline.schedule_csv import read_orders, write_orders
from shardtrain.pipeline.schedule_table import SlotTable, lifetimes, peak, slot_table
from shardtrain.pipeline.tasks import DEFAULT_COSTS, KINDS, SlotCosts, Timetable
from shardtrain.pipeline.validate import validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


@dataclasses.dataclass(frozen=True)
class Schedule(Timetable):
    """A valid pipeline timetable with its price and its pictures.

    Raises:
        ScheduleError: the tasks are not a complete, causal timetable (see `validate`).
    """

    def __post_init__(self):
        validate(self)

    @functools.cached_property
    def table(self) -> SlotTable:
        """Dense integer form with buffer rows, as the executor scans it."""
        return slot_table(self)

    def time(self, costs: SlotCosts = DEFAULT_COSTS) -> float:
        """Time of one step in the unit of `costs`: a tick costs the slots that any stage uses."""
        slot = {kind: costs.of(kind, self.splits_weight, self.virtual_stages) for kind in KINDS}
        return sum(len(phase) * sum(slot[k] for k in phase.slots) for phase in self.table.phases)

    def ideal_time(self, costs: SlotCosts = DEFAULT_COSTS) -> float:
        """Work of one stage: `num_microbatches * (forward + backward + weight)`."""
        return self.num_microbatches * (costs.forward + costs.backward + costs.weight)

    def bubble(self, costs: SlotCosts = DEFAULT_COSTS) -> float:
        """Share of a step a stage is idle, for measured slot costs."""
        return 1.0 - self.ideal_time(costs) / self.time(costs)

    @property
    def bubble_fraction(self) -> float:
        """Share of a step a stage is idle: `(p-1)/(m+p-1)` for 1f1b, `(p-1)/(v*m+p-1)` interleaved.

        Does not depend on the slot costs, but for `zero-bubble`: there it is for the default
        `SlotCosts`.
        """
        return self.bubble()

    @functools.cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Chunk inputs alive at most, per stage, in this lockstep form: `2 * (p - s) - 1` for 1f1b.

        A runtime with one program per stage holds `p - s` (`simulate_mpmd().peak_activations`).
        """
        return peak(lifetimes(self)["stash"], self.num_stages)

    @property
    def stash_rows(self) -> int:
        """Chunk inputs every device keeps room for: the largest of `peak_activations`."""
        return self.table.stash_rows

    def simulate_mpmd(
        self, forward: float = 1.0, backward: float = 2.0, weight: float = 1.0
    ) -> mpmd.MpmdTimeline:
        """What separate programs per stage would reach with the classic form of this schedule.

        Args:
            forward: time of one stage's forward of one microbatch, any unit.
            backward: time of its input gradient (and recomputed forward).
            weight: time of its weight gradient.
        """
        sizes = (self.num_stages, self.num_microbatches, self.virtual_stages)
        named = self.name in SCHEDULES
        orders = mpmd_orders(self.name, *sizes) if named else self.orders()
        return mpmd.simulate(orders, self, SlotCosts(forward, backward, weight))

    def orders(self) -> list[list]:
        """The ops of every stage in the order it does them."""
        orders: list[list] = [[] for _ in range(self.num_stages)]
        for task in sorted(self.tasks, key=lambda t: (t.tick, KINDS.index(t.kind))):
            orders[task.stage].append(task.op)
        return orders

    def to_csv(self, path: str | os.PathLike | None = None) -> str:
        """The schedule as CSV, one row per stage, cells like `0F3` (chunk, kind, microbatch).

        torchtitan's form: there `B` is the whole backward, and the input gradient alone is `I`.
        """
        text = write_orders(self)
        if path is not None:
            pathlib.Path(path).write_text(text)
        return text

    def plot(self, costs: SlotCosts = DEFAULT_COSTS) -> "Figure":
        """Draw the step over time, one row per stage; idle slots stay empty."""
        return draw.figure(self, self.table.phases, costs)

    def __str__(self) -> str:
        head = (
            f"{self.name}: {self.num_stages} stages x {self.virtual_stages} virtual, "
            f"{self.num_microbatches} microbatches, bubble {self.bubble_fraction:.1%}, "
            f"stash {self.stash_rows} inputs per device"
        )
        return f"{head}\n{draw.text(self)}"

    def _repr_html_(self) -> str:
        return draw.svg(self, self.table.phases, DEFAULT_COSTS)


def make_schedule(
    name: str, num_stages: int, num_microbatches: int, virtual_stages: int = 1
) -> Schedule:
    """Make a schedule by name, or from a CSV file.

    Args:
        name: `gpipe`, `1f1b`, `interleaved`, `zero-bubble`, or the path of a `.csv` file.
        num_stages: size of the mesh axis `pipeline`.
        num_microbatches: pieces of the batch.
        virtual_stages: pieces of the model on each stage; more than one needs `interleaved`,
            `zero-bubble` or a CSV file.

    Raises:
        ScheduleError: unknown name (the nearest is suggested), sizes below one, or a schedule that
            is not valid for these sizes.

    >>> print(make_schedule("gpipe", 2, 2))
    gpipe: 2 stages x 1 virtual, 2 microbatches, bubble 33.3%, stash 2 inputs per device
    stage 0 | F0 F1 .  .  .
            | .  .  .  B0 B1
    stage 1 | .  F0 F1 .  .
            | .  .  B0 B1 .
    """
    sizes = {
        "num_stages": num_stages,
        "num_microbatches": num_microbatches,
        "virtual_stages": virtual_stages,
    }
    for field, size in sizes.items():
        if size < 1:
            raise ScheduleError(f"schedule {name!r}: {field}={size}, but it must be at least 1")
    if str(name).endswith(".csv"):
        return schedule_from_csv(name, num_microbatches, virtual_stages, num_stages)
    if name not in SCHEDULES:
        raise ScheduleError(
            f"unknown schedule {name!r}: {suggest(name, SCHEDULES)} "
            "A schedule of your own is the path of a .csv file."
        )
    if virtual_stages > 1 and name in ("gpipe", "1f1b"):
        raise ScheduleError(
            f"schedule {name!r} gives every stage one piece of the model, but "
            f"virtual_stages={virtual_stages}. Use schedule='interleaved', or virtual_stages=1."
        )
    orders = lockstep_orders(name, num_stages, num_microbatches, virtual_stages)
    tasks = place(orders, virtual_stages)
    return Schedule(name, num_stages, num_microbatches, virtual_stages, tasks)


def schedule_from_csv(
    source: str | os.PathLike,
    num_microbatches: int | None = None,
    virtual_stages: int | None = None,
    num_stages: int | None = None,
) -> Schedule:
    """Read a schedule from CSV text or a CSV file in torchtitan's form.

    Only each row's order counts: ticks are chosen again so that every task runs as early as its
    row and its inputs allow.

    Args:
        source: CSV text, or the path of a file; one row per stage.
        num_microbatches: what the file must have, if given.
        virtual_stages: what the file must have, if given.
        num_stages: what the file must have, if given.

    Raises:
        ScheduleError: a cell cannot be read, the sizes differ from those asked for, or the
            timetable is not valid.
    """
    text = str(source)
    name = "csv"
    if "\n" not in text and "," not in text:
        path = pathlib.Path(text)
        if not path.is_file():
            raise ScheduleError(f"schedule file {path} does not exist")
        name, text = path.name, path.read_text()
    orders = read_orders(text, name)
    ops = [op for order in orders for op in order]
    sizes = {
        "num_stages": (len(orders), num_stages),
        "num_microbatches": (1 + max(op.microbatch for op in ops), num_microbatches),
        "virtual_stages": (1 + max(op.virtual_stage for op in ops), virtual_stages),
    }
    for field, (found, wanted) in sizes.items():
        if wanted is not None and found != wanted:
            raise ScheduleError(
                f"schedule {name!r} is for {field}={found}, but the strategy has {field}={wanted}"
            )
    p, m, v = (found for found, _ in sizes.values())
    return Schedule(name, p, m, v, place(orders, v))
