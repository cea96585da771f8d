"""One tick of the pipeline: what every stage does, from the table's row for that tick."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.pipeline.backward import backward, cut_of, weights
from shardtrain.pipeline.buffers import put, take, where, zeros_like
from shardtrain.pipeline.flight import Flight, Row, Tick, is_float
from shardtrain.pipeline.residual import Residual


def start(tick: Tick, blocks: list[Any], states: list[Any]) -> Flight:
    """Empty buffers and zero sums."""
    p, table = tick.schedule.num_stages, tick.schedule.table
    buffer = lambda rows, x: jnp.zeros((p, rows + 1, *x.shape), x.dtype)
    carry = tick.carry_types
    slots = [jax.ShapeDtypeStruct(s.shape[2:], s.dtype) for s in states]
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    late = [tick.outer.variables[n] for n in tick.late]
    head = jax.eval_shape(lambda: tick.post(0, [jnp.zeros(c.shape, c.dtype) for c in carry], late))
    num_out = len(head) - len(late)
    flight = tick.keep(
        Flight(
            inputs=[buffer(table.stash_rows, c) for c in carry],
            input_states=[buffer(table.stash_rows, s) for s in slots],
            gradients=[buffer(table.gradient_rows, c) for c in carry if is_float(c)],
            residuals=Residual([], []),
            sent=[jnp.zeros((p, *c.shape), c.dtype) for c in carry],
            sent_gradients=[jnp.zeros((p, *c.shape), c.dtype) for c in carry if is_float(c)],
            states=states,
            grads=[wide(x) for x in blocks],
            outer_grads=[wide(x) for x in tick.outer.params],
            sums=[jnp.zeros(x.shape, x.dtype) for x in head[:num_out]],
            post_state=[tick.outer.variables[n] for n in tick.late],
        ),
    )
    if not tick.schedule.splits_weight:
        return flight
    kept = jax.tree.map(
        lambda x: buffer(table.weight_rows, x), cut_of(tick, flight, blocks).residual
    )
    return dataclasses.replace(flight, residuals=tick.place.residuals(kept))


def run(tick: Tick, flight: Flight, row: Row, blocks: list[Any], slots: tuple[str, ...]) -> Flight:
    """All slots of one tick."""
    if "F" in slots:
        flight = forward(tick, flight, row, blocks)
    if "B" in slots:
        flight = backward(tick, flight, row, blocks)
    if "W" in slots:
        flight = weights(tick, flight, row, blocks)
    return tick.keep(flight)


def forward(tick: Tick, flight: Flight, row: Row, blocks: list[Any]) -> Flight:
    """Slot F: every stage runs its chunk on a new or an arrived input and stashes that input."""
    active, m = row["F"] >= 0, jnp.maximum(row["F"], 0)
    v = jnp.maximum(row["Fv"], 0)
    stage = jnp.arange(tick.schedule.num_stages)
    entering = first_carry(tick, m[0], active[0] & (v[0] == 0))
    inputs = put(flight.inputs, flight.sent, row["arrival"])
    x = take(inputs, row["stash"])
    x = where(
        (stage == 0) & (v == 0),
        [jnp.broadcast_to(f, y.shape) for f, y in zip(entering, x, strict=True)],
        x,
    )
    x = tick.place.stages(x)
    states = take(flight.states, v)
    sides = tick.stages.sides(lambda m: tick.outer.at(m, {}), m, v)
    y, new = tick.stages.run(take(blocks, v), states, sides, v, x)
    sent = [jnp.roll(a, 1, axis=0) for a in tick.place.stages(y)]
    return dataclasses.replace(
        flight,
        inputs=put(inputs, x, row["stash"]),
        input_states=put(flight.input_states, states, row["stash"]),
        sent=tick.place.stages(sent),
        states=put(flight.states, where(active, new, states), v),
    )


def first_carry(tick: Tick, m: jax.Array, active: jax.Array) -> list[Any]:
    """The first carry of microbatch `m`; with virtual stages only in the ticks that need it."""
    compute = lambda: tick.place.microbatch(tick.stages.first_carry(tick.outer.at(m, {})))
    if tick.schedule.virtual_stages == 1:
        return compute()
    idle = lambda: tick.place.microbatch(zeros_like(tick.carry_types))
    return jax.lax.cond(active, compute, idle)
