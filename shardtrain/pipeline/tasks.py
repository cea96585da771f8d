"""The words of a pipeline timetable: which stage computes what in which tick. Imports no JAX.

A model cut into `num_stages * virtual_stages` equal *chunks* runs on `num_stages` pipeline stages;
chunk `k` lives on stage `k % num_stages` as its virtual stage `k // num_stages`.

Time is counted in *ticks*. In every tick each stage has three slots, in this order:

| slot | computes |
|---|---|
| F | the forward of one (microbatch, virtual stage) |
| B | its backward: the input gradient, and the weight gradient too unless the timetable has W |
| W | its weight gradient alone (`zero-bubble`) |

All stages run the same slots in the same tick, because one SPMD program has one instruction
stream: a slot that only some stages need costs all of them its time. A slot nobody needs in a
tick is left out (see `schedule_table.phases`).
"""

import dataclasses
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")


class Op(NamedTuple):
    """One computation, not yet placed in time."""

    kind: Kind
    microbatch: int
    virtual_stage: int


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """One computation placed on a stage in a tick."""

    tick: int
    stage: int
    kind: Kind
    microbatch: int
    virtual_stage: int

    @property
    def op(self) -> Op:
        """The computation without its place."""
        return Op(self.kind, self.microbatch, self.virtual_stage)

    def __str__(self) -> str:
        return (
            f"{self.kind} of microbatch {self.microbatch}, virtual stage {self.virtual_stage} "
            f"(tick {self.tick}, stage {self.stage})"
        )


@dataclasses.dataclass(frozen=True)
class SlotCosts:
    """What one whole stage (all its virtual stages) takes per microbatch, in any unit of time.

    The defaults count one forward as 1: the backward recomputes the forward and forms the input
    gradient (2), then the weight gradient (1). Without W tasks the B slot costs both.
    """

    forward: float = 1.0
    backward: float = 2.0
    weight: float = 1.0

    def of(self, kind: Kind, splits_weight: bool, virtual_stages: int) -> float:
        """Time of one slot of this kind for one virtual stage."""
        fused = 0.0 if splits_weight else self.weight
        whole = {"F": self.forward, "B": self.backward + fused, "W": self.weight}[kind]
        return whole / virtual_stages


DEFAULT_COSTS = SlotCosts()


@dataclasses.dataclass(frozen=True)
class Timetable:
    """A complete pipeline timetable: plain data, hashable, comparable."""

    name: str
    num_stages: int
    num_microbatches: int
    virtual_stages: int
    tasks: tuple[Task, ...]

    @property
    def num_chunks(self) -> int:
        """Pieces the model's repeated blocks are cut into."""
        return self.num_stages * self.virtual_stages

    @property
    def num_ticks(self) -> int:
        """Length of the timetable in ticks."""
        return 1 + max((task.tick for task in self.tasks), default=-1)

    @property
    def splits_weight(self) -> bool:
        """Whether weight gradients have tasks of their own (W)."""
        return any(task.kind == "W" for task in self.tasks)

    def chunk(self, task: Task) -> int:
        """Index of the model chunk a task works on, 0 .. num_chunks - 1."""
        return task.virtual_stage * self.num_stages + task.stage
