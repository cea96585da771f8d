"""One tick of the pipeline: what every stage does, from the table's row for that tick."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.pipeline.buffers import AXIS, Placement, put, take, where, zeros_like
from shardtrain.pipeline.schedule_table import Phase, SlotTable
from shardtrain.pipeline.schedules import Schedule
from shardtrain.pipeline.split_backward import split_backward
from shardtrain.pipeline.stage_map import Stages
from shardtrain.pipeline.stages import StageMajor

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
        states: the blocks' variables now, `[P, V, layers, ...]`.
        grads, outer_grads: gradient sums, float32.
        sums: loss, weight and metrics so far.
        post_state: variables that change after the last block.
    """

    inputs: list[Any]
    input_states: list[Any]
    gradients: list[Any]
    residuals: list[Any]
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
        "arrival": table.arrival_row,
        "gradient": table.gradient_row,
        "gradient_arrival": table.gradient_arrival_row,
        "weight": table.weight_row,
        "weight_read": table.weight_read_row,
    }
    for kind in phase.slots:
        row |= {kind: table.microbatch[kind], f"{kind}v": table.virtual_stage[kind]}
    return {name: jnp.asarray(column[part]) for name, column in row.items()}


def is_float(x: Any) -> bool:
    """Whether an array (or its type) carries gradients."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


@dataclasses.dataclass(frozen=True)
class Tick:
    """The work of a tick.

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
    def _carry_types(self) -> list[Any]:
        return jax.eval_shape(lambda: self.stages.first_carry(self.outer.at(0, {})))

    def start(self, blocks: list[Any], states: list[Any]) -> Flight:
        """Empty buffers and zero sums."""
        p, table, model = self.schedule.num_stages, self.schedule.table, self.stages.model
        buffer = lambda rows, x: jnp.zeros((p, rows + 1, *x.shape), x.dtype)
        carry = self._carry_types
        slots = [jax.ShapeDtypeStruct(s.shape[2:], s.dtype) for s in states]
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        late = [self.outer.variables[n] for n in self._late]
        head = jax.eval_shape(
            lambda: self._post(0, [jnp.zeros(c.shape, c.dtype) for c in carry], late)
        )
        num_out = len(head) - len(late)
        flight = self._keep(
            Flight(
                inputs=[buffer(table.stash_rows, c) for c in carry],
                input_states=[buffer(table.stash_rows, s) for s in slots],
                gradients=[buffer(table.gradient_rows, c) for c in carry if is_float(c)],
                residuals=[],
                states=states,
                grads=[wide(x) for x in blocks],
                outer_grads=[wide(x) for x in self.outer.params],
                sums=[jnp.zeros(x.shape, x.dtype) for x in head[:num_out]],
                post_state=[self.outer.variables[n] for n in self._late],
            ),
            model,
        )
        if not self.schedule.splits_weight:
            return flight
        kept = [buffer(table.weight_rows, x) for x in self._cut_of(flight, blocks).residual]
        return dataclasses.replace(flight, residuals=self.place.buffers(kept))

    @property
    def _late(self) -> list[int]:
        model = self.stages.model
        return [model.outer_variables.index(path) for path in model.post_state]

    def _post(
        self, m: Any, carry: list[Any], late: list[Any], params: list[Any] | None = None
    ) -> list[Any]:
        changed = dict(zip(self._late, late, strict=True))
        outer = self.outer.at(m, changed, params)
        fixed = len(self.outer.params) + len(self.outer.variables)
        batch = self.place.spread(outer[fixed:-1])
        return self.stages.model.post(*outer[:fixed], *batch, outer[-1], *self.place.spread(carry))

    def _keep(self, flight: Flight, model: Any) -> Flight:
        """Constrain everything the loop carries, every tick: loops take no other sharding."""
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
            residuals=self.place.buffers(flight.residuals),
            grads=[grads.blocks[leaf.name] for leaf in model.params],
            outer_grads=[grads.outer[p] for p in model.outer_params],
        )

    def run(self, flight: Flight, row: Row, blocks: list[Any], slots: tuple[str, ...]) -> Flight:
        """All slots of one tick, then the sends."""
        sent: list[Any] = []
        if "F" in slots:
            flight, sent = self._forward(flight, row, blocks)
        if "B" in slots:
            flight = self._backward(flight, row, blocks)
        if "W" in slots:
            flight = self._weights(flight, row, blocks)
        if "F" in slots:
            arrived = self.place.stages([jnp.roll(y, 1, axis=0) for y in sent])
            flight = dataclasses.replace(flight, inputs=put(flight.inputs, arrived, row["arrival"]))
        return self._keep(flight, self.stages.model)

    def _first(self, m: jax.Array, active: jax.Array) -> list[Any]:
        """The first carry of microbatch `m`; with virtual stages only in the ticks that need it."""
        compute = lambda: self.place.microbatch(self.stages.first_carry(self.outer.at(m, {})))
        if self.schedule.virtual_stages == 1:
            return compute()
        idle = lambda: self.place.microbatch(zeros_like(self._carry_types))
        return jax.lax.cond(active, compute, idle)

    def _forward(self, flight: Flight, row: Row, blocks: list[Any]) -> tuple[Flight, list[Any]]:
        active, m = row["F"] >= 0, jnp.maximum(row["F"], 0)
        v = jnp.maximum(row["Fv"], 0)
        stage = jnp.arange(self.schedule.num_stages)
        first = self._first(m[0], active[0] & (v[0] == 0))
        x = take(flight.inputs, row["stash"])
        x = where(
            (stage == 0) & (v == 0),
            [jnp.broadcast_to(f, y.shape) for f, y in zip(first, x, strict=True)],
            x,
        )
        x = self.place.stages(x)
        states = take(flight.states, v)
        sides = self.stages.sides(lambda m: self.outer.at(m, {}), m, v)
        y, new = self.stages.run(take(blocks, v), states, sides, v, x)
        flight = dataclasses.replace(
            flight,
            inputs=put(flight.inputs, x, row["stash"]),
            input_states=put(flight.input_states, states, row["stash"]),
            states=put(flight.states, where(active, new, states), v),
        )
        return flight, self.place.stages(y)

    def _backward(self, flight: Flight, row: Row, blocks: list[Any]) -> Flight:
        active, m = row["B"] >= 0, jnp.maximum(row["B"], 0)
        v = jnp.maximum(row["Bv"], 0)
        x = self.place.stages(take(flight.inputs, row["backward"]))
        states = take(flight.input_states, row["backward"])
        chunk = take(blocks, v)
        sides = self.stages.sides(lambda m: self.outer.at(m, {}), m, v)
        smooth = [n for n, grad in enumerate(self.stages.model.side_grads) if grad]
        y, pull = self._stage_pullback(chunk, states, sides, smooth, v, x)
        flight, head = self._head(flight, m, active, v, y)
        last = jnp.arange(self.schedule.num_stages) == self.schedule.num_stages - 1
        last = last & (v == self.schedule.virtual_stages - 1)
        g = take(flight.gradients, row["gradient"])
        g = where(last, [jnp.broadcast_to(h, a.shape) for h, a in zip(head, g, strict=True)], g)
        weights, d_soft, d_x = pull(self.place.stages(g))
        d_x = self.place.stages(d_x)
        if self.schedule.splits_weight:
            kept = put(flight.residuals, weights, row["weight"])
            flight = dataclasses.replace(flight, residuals=kept)
        else:
            flight = self._add_chunk(flight, active, v, weights)
        flight = self._add_sides(flight, active, m, v, smooth, d_soft)
        flight = self._add_first(flight, active, m, v, d_x)
        arrived = self.place.stages([jnp.roll(g, -1, axis=0) for g in d_x])
        return dataclasses.replace(
            flight, gradients=put(flight.gradients, arrived, row["gradient_arrival"])
        )

    def _stage_pullback(
        self, chunk: list, states: list, sides: list, smooth: list[int], v: jax.Array, x: list
    ) -> tuple[list, Callable[[list], tuple[list, list, list]]]:
        """The stages' outputs again, and `gradient of outputs -> (weights, sides, inputs)`.

        `weights` is the parameters' gradient, or what slot W needs to compute it.
        """
        soft = [sides[n] for n in smooth]
        floats = [a for a in x if is_float(a)]
        if self.schedule.splits_weight:
            return self._split_pullback(chunk, states, sides, smooth, v, x)

        def stage(params: list[Any], soft: list[Any], floats: list[Any]) -> tuple[list, list]:
            y, _ = self.stages.run(params, states, _set(sides, smooth, soft), v, _merge(x, floats))
            return _floats_first(y)

        y, pull, others = jax.vjp(stage, chunk, soft, floats, has_aux=True)
        return _merge_like(x, y, others), pull

    def _split(self, chunk: list, states: list, sides: list, smooth: list[int], x: list) -> Any:
        """The backward of one stage cut in two; `[P, ...]` arguments give the types."""
        num_soft, num_states, num_sides = len(smooth), len(states), len(sides)

        def stage(params: list, soft: list, fixed: list) -> tuple[list, list]:
            states, rest = fixed[:num_states], fixed[num_states:]
            values = _set(rest[:num_sides], smooth, soft[:num_soft])
            carry = _merge(rest[num_sides : num_sides + len(x)], soft[num_soft:])
            return _floats_first(self.stages.one(params, states, values, rest[-1], carry)[0])

        one = lambda xs: [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in xs]
        floats = [a for a in x if is_float(a)]
        start = [jax.ShapeDtypeStruct((), jnp.int32)]
        params = jax.eval_shape(self.stages.prepare, chunk)
        soft = [sides[n] for n in smooth]
        return split_backward(
            stage, one(params), one([*soft, *floats]), [*one([*states, *sides, *x]), *start]
        )

    def _split_pullback(
        self, chunk: list, states: list, sides: list, smooth: list[int], v: jax.Array, x: list
    ) -> tuple[list, Callable[[list], tuple[list, list, list]]]:
        cut = self._split(chunk, states, sides, smooth, x)
        floats = [a for a in x if is_float(a)]
        soft = [*(sides[n] for n in smooth), *floats]
        given = [
            *self.stages.prepare(chunk), *soft, *states, *sides, *x, self.stages.first_layer(v),
        ]  # fmt: skip
        over = lambda fn, args: jax.vmap(fn, spmd_axis_name=AXIS)(*args)
        out = over(cut.forward, given)
        y, kept = out[: cut.num_outputs], out[cut.num_outputs :]

        def pull(g: list) -> tuple[list, list, list]:
            out = over(cut.inputs, [*given, *kept, *g])
            grads, residual = out[: cut.num_input_grads], out[cut.num_input_grads :]
            return residual, grads[: len(smooth)], grads[len(smooth) :]

        return _merge_like(x, y[: len(floats)], y[len(floats) :]), pull

    def _weights(self, flight: Flight, row: Row, blocks: list[Any]) -> Flight:
        """Slot W: weight gradients from what slot B kept."""
        active, v = row["W"] >= 0, jnp.maximum(row["Wv"], 0)
        cut = self._cut_of(flight, blocks)
        prepared, pull = jax.vjp(self.stages.prepare, take(blocks, v))
        kept = take(flight.residuals, row["weight_read"])
        grads = jax.vmap(cut.weights, spmd_axis_name=AXIS)(*prepared, *kept)
        return self._add_chunk(flight, active, v, pull(grads)[0])

    def _cut_of(self, flight: Flight, blocks: list[Any]) -> Any:
        """The cut backward from the types of what the loop carries."""
        p = self.schedule.num_stages
        one = lambda xs: [jax.ShapeDtypeStruct((p, *a.shape[2:]), a.dtype) for a in xs]
        zeros = jnp.zeros(p, jnp.int32)
        sides = jax.eval_shape(
            lambda: self.stages.sides(lambda m: self.outer.at(m, {}), zeros, zeros)
        )
        smooth = [n for n, grad in enumerate(self.stages.model.side_grads) if grad]
        return self._split(one(blocks), one(flight.input_states), sides, smooth, one(flight.inputs))

    def _head(
        self, flight: Flight, m: jax.Array, active: jax.Array, v: jax.Array, y: list[Any]
    ) -> tuple[Flight, list[Any]]:
        """Loss of the microbatch at the last stage, its sums, and the gradient of its carry."""
        on = active[-1] & (v[-1] == self.schedule.virtual_stages - 1)
        carry = self.place.microbatch([a[-1] for a in y])
        tree = self.stages.model.output_tree

        def loss(params: list[Any], floats: list[Any]) -> tuple[Any, list[Any]]:
            out = self._post(m[-1], _merge(carry, floats), flight.post_state, params)
            sums = out[: len(flight.sums)]
            return jax.tree.unflatten(tree, sums).loss.total, out

        def compute() -> tuple[list, list, list]:
            floats = [a for a in carry if is_float(a)]
            (d_outer, d_carry), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(
                self.outer.params, floats
            )
            return d_outer, self.place.microbatch(d_carry), out

        if self.schedule.virtual_stages == 1:
            d_outer, d_carry, out = compute()
        else:
            idle = lambda: jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute)
            )
            kept = lambda done: (done[0], self.place.microbatch(done[1]), done[2])
            d_outer, d_carry, out = jax.lax.cond(on, compute, lambda: kept(idle()))
        count = len(flight.sums)
        sums = where(
            on, [a + b for a, b in zip(flight.sums, out[:count], strict=True)], flight.sums
        )
        return dataclasses.replace(
            flight,
            sums=sums,
            post_state=where(on, out[count:], flight.post_state),
            outer_grads=_add(flight.outer_grads, on, d_outer),
        ), d_carry

    def _add_chunk(self, flight: Flight, active: jax.Array, v: jax.Array, grads: list) -> Flight:
        old = take(flight.grads, v)
        return dataclasses.replace(flight, grads=put(flight.grads, _add(old, active, grads), v))

    def _add_sides(
        self, flight: Flight, active: jax.Array, m: Any, v: Any, smooth: list[int], grads: list
    ) -> Flight:
        """Gradients that reach outer parameters through what blocks read beside the carry."""
        if not smooth:
            return flight

        def again(params: list[Any]) -> list[Any]:
            found = self.stages.sides(lambda m: self.outer.at(m, {}, params), m, v)
            return [found[n] for n in smooth]

        _, pull = jax.vjp(again, self.outer.params)
        (d_outer,) = pull(where(active, grads, zeros_like(grads)))
        return dataclasses.replace(
            flight, outer_grads=_add(flight.outer_grads, jnp.bool_(True), d_outer)
        )

    def _add_first(
        self, flight: Flight, active: jax.Array, m: jax.Array, v: jax.Array, grads: list
    ) -> Flight:
        """Gradients of what computes the first carry (the embedding)."""
        on = active[0] & (v[0] == 0)
        arrived = self.place.microbatch([g[0] for g in grads])

        def again(params: list[Any]) -> list[Any]:
            carry = self.stages.first_carry(self.outer.at(m[0], {}, params))
            return [x for x in carry if is_float(x)]

        def compute() -> list[Any]:
            _, pull = jax.vjp(again, self.outer.params)
            return pull(arrived)[0]

        if self.schedule.virtual_stages == 1:
            d_outer = compute()
        else:
            d_outer = jax.lax.cond(on, compute, lambda: zeros_like(self.outer.params))
        return dataclasses.replace(flight, outer_grads=_add(flight.outer_grads, on, d_outer))


def _merge(like: list[Any], floats: list[Any]) -> list[Any]:
    """`like` with its floating arrays replaced."""
    rest = iter(floats)
    return [next(rest) if is_float(x) else x for x in like]


def _merge_like(like: list[Any], floats: list[Any], others: list[Any]) -> list[Any]:
    first, second = iter(floats), iter(others)
    return [next(first) if is_float(x) else next(second) for x in like]


def _set(values: list[Any], where: list[int], new: list[Any]) -> list[Any]:
    found = list(values)
    for n, value in zip(where, new, strict=True):
        found[n] = value
    return found


def _floats_first(values: list[Any]) -> tuple[list[Any], list[Any]]:
    return [a for a in values if is_float(a)], [a for a in values if not is_float(a)]


def _add(sums: list[Any], active: jax.Array, grads: list[Any]) -> list[Any]:
    wide = [g.astype(s.dtype) for s, g in zip(sums, grads, strict=True)]
    return where(active, [s + g for s, g in zip(sums, wide, strict=True)], sums)
