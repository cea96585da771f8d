"""What a tick works on: the loop's state, and everything that does not change in the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.pipeline.buffers import Placement, where
from shardtrain.pipeline.residual import Residual
from shardtrain.pipeline.schedule_table import Phase, SlotTable
from shardtrain.pipeline.schedules import Schedule
from shardtrain.pipeline.stage_map import Stages
from shardtrain.pipeline.stages import StageMajor
from shardtrain.pipeline.tasks import Kind

Row = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Outer:
    """Everything the pieces outside the blocks read, for any microbatch.

    Args:
        params: outer parameters.
        variables: outer variables before the step.
        batch: batch leaves `[M, rows, ...]`.
        key: key of the step.
        versions: index of a variable -> its `[M, ...]` values, for those that change.
    """

    params: list[Any]
    variables: list[Any]
    batch: list[Any]
    key: jax.Array
    versions: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def at(self, m: Any, changed: Mapping[int, Any], params: list[Any] | None = None) -> list[Any]:
        """The flat outer values of microbatch `m`, some variables changed."""
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, m, 0, keepdims=False)
        versions = {n: pick(x) for n, x in self.versions.items()} | dict(changed)
        return [
            *(self.params if params is None else params),
            *(versions.get(n, x) for n, x in enumerate(self.variables)),
            *(pick(x) for x in self.batch),
            jax.random.fold_in(self.key, m),
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flight:
    """What the loop carries.

    Args:
        inputs: stashed chunk inputs `[P, stash rows + 1, ...]`.
        input_states: block variables as the forward saw them, stashed next to the inputs.
        gradients: arrived gradients `[P, gradient rows + 1, ...]`, of floating inputs only.
        residuals: what slot W needs of slot B, `[P, weight rows + 1, ...]`.
        sent, sent_gradients: what arrived from the neighbours `[P, ...]`; the next tick puts it
            into `inputs` and `gradients` before it reads them. Written after a read, a whole
            buffer would be copied in every tick.
        states: the blocks' variables now, `[P, V, layers, ...]`.
        grads, outer_grads: gradient sums, float32.
        sums: loss, weight and metrics so far.
        post_state: variables that change after the last block.
    """

    inputs: list[Any]
    input_states: list[Any]
    gradients: list[Any]
    residuals: Residual
    sent: list[Any]
    sent_gradients: list[Any]
    states: list[Any]
    grads: list[Any]
    outer_grads: list[Any]
    sums: list[Any]
    post_state: list[Any]


def rows_of(table: SlotTable, phase: Phase) -> Row:
    """The table's columns for the ticks of one phase, ready to be scanned over."""
    part = slice(phase.start, phase.stop)
    row = {
        "stash": table.stash_row,
        "backward": table.backward_row,
        "arrival": _next(table, "F", table.arrival_row, table.stash_rows),
        "gradient": table.gradient_row,
        "gradient_arrival": _next(table, "B", table.gradient_arrival_row, table.gradient_rows),
        "weight": table.weight_row,
        "weight_read": table.weight_read_row,
    }
    for kind in phase.slots:
        row |= {kind: table.microbatch[kind], f"{kind}v": table.virtual_stage[kind]}
    return {name: jnp.asarray(column[part]) for name, column in row.items()}


def _next(table: SlotTable, kind: Kind, column: np.ndarray, trash: int) -> np.ndarray:
    """A column of arrivals, moved to the next tick with the slot that reads what arrived."""
    ticks = [t for p in table.phases if kind in p.slots for t in range(p.start, p.stop)]
    moved = np.full_like(column, trash)
    moved[ticks[1:]] = column[ticks[:-1]]
    return moved


def is_float(x: Any) -> bool:
    """Whether an array (or its type) carries gradients."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


@dataclasses.dataclass(frozen=True)
class Tick:
    """What all ticks share.

    Args:
        stages: one stage's work, mapped over stages.
        schedule: the timetable.
        place: sharding constraints.
        outer: what pieces outside the blocks read.
        constrain: keeps gradients in their sharding.
    """

    stages: Stages
    schedule: Schedule
    place: Placement
    outer: Outer
    constrain: Callable[[StageMajor], StageMajor]

    @property
    def carry_types(self) -> list[Any]:
        """Types of the carry between blocks."""
        return jax.eval_shape(lambda: self.stages.first_carry(self.outer.at(0, {})))

    @property
    def late(self) -> list[int]:
        """Indices of the outer variables that change after the last block."""
        model = self.stages.model
        return [model.outer_variables.index(path) for path in model.post_state]

    def post(
        self, m: Any, carry: list[Any], late: list[Any], params: list[Any] | None = None
    ) -> list[Any]:
        """`post` of microbatch `m`, its rows spread over all devices."""
        changed = dict(zip(self.late, late, strict=True))
        outer = self.outer.at(m, changed, params)
        fixed = len(self.outer.params) + len(self.outer.variables)
        batch = self.place.spread(outer[fixed:-1])
        return self.stages.model.post(*outer[:fixed], *batch, outer[-1], *self.place.spread(carry))

    def keep(self, flight: Flight) -> Flight:
        """Constrain everything the loop carries, every tick: loops take no other sharding."""
        model = self.stages.model
        grads = self.constrain(
            StageMajor(
                dict(zip(model.outer_params, flight.outer_grads, strict=True)),
                {leaf.name: g for leaf, g in zip(model.params, flight.grads, strict=True)},
            )
        )
        return dataclasses.replace(
            flight,
            inputs=self.place.buffers(flight.inputs),
            gradients=self.place.buffers(flight.gradients),
            residuals=self.place.residuals(flight.residuals),
            sent=self.place.stages(flight.sent),
            sent_gradients=self.place.stages(flight.sent_gradients),
            grads=[grads.blocks[leaf.name] for leaf in model.params],
            outer_grads=[grads.outer[p] for p in model.outer_params],
        )


def merge(like: list[Any], floats: list[Any]) -> list[Any]:
    """`like` with its floating arrays replaced."""
    rest = iter(floats)
    return [next(rest) if is_float(x) else x for x in like]


def merge_like(like: list[Any], floats: list[Any], others: list[Any]) -> list[Any]:
    """Floating and other arrays in the order of `like`."""
    first, second = iter(floats), iter(others)
    return [next(first) if is_float(x) else next(second) for x in like]


def replaced(values: list[Any], where: list[int], new: list[Any]) -> list[Any]:
    """`values` with those at the indices `where` replaced by `new`."""
    found = list(values)
    for n, value in zip(where, new, strict=True):
        found[n] = value
    return found


def floats_first(values: list[Any]) -> tuple[list[Any], list[Any]]:
    """The floating arrays, and the others."""
    return [a for a in values if is_float(a)], [a for a in values if not is_float(a)]


def add(sums: list[Any], active: jax.Array, grads: list[Any]) -> list[Any]:
    """Add gradients to sums of their own (wider) dtype, where active."""
    wide = [g.astype(s.dtype) for s, g in zip(sums, grads, strict=True)]
    return where(active, [s + g for s, g in zip(sums, wide, strict=True)], sums)
