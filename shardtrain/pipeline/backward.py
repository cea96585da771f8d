"""Slots B and W: a stage's backward from its stashed input, whole or cut in two."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.pipeline.buffers import AXIS, put, take, where
from shardtrain.pipeline.flight import (
    Flight,
    Row,
    Tick,
    add,
    floats_first,
    is_float,
    merge,
    merge_like,
    replaced,
)
from shardtrain.pipeline.head import add_first, add_sides, head
from shardtrain.pipeline.split_backward import SplitBackward, split_backward
from shardtrain.train.widen import widen


def backward(tick: Tick, flight: Flight, row: Row, blocks: list[Any]) -> Flight:
    """Slot B: recompute the stage from its stashed input and pull the gradient through it."""
    active, m = row["B"] >= 0, jnp.maximum(row["B"], 0)
    v = jnp.maximum(row["Bv"], 0)
    x = tick.place.stages(take(flight.inputs, row["backward"]))
    states = take(flight.input_states, row["backward"])
    chunk = take(blocks, v)
    sides = tick.stages.sides(lambda m: tick.outer.at(m, {}), m, v)
    smooth = [n for n, grad in enumerate(tick.stages.model.side_grads) if grad]
    y, pull = pullback(tick, chunk, states, sides, smooth, v, x)
    flight, loss_grad = head(tick, flight, m, active, v, y)
    last = jnp.arange(tick.schedule.num_stages) == tick.schedule.num_stages - 1
    last = last & (v == tick.schedule.virtual_stages - 1)
    g = take(flight.gradients, row["gradient"])
    g = where(last, [jnp.broadcast_to(h, a.shape) for h, a in zip(loss_grad, g, strict=True)], g)
    weights, d_soft, d_x = pull(tick.place.stages(g))
    d_x = tick.place.stages(d_x)
    if tick.schedule.splits_weight:
        kept = put(flight.residuals, weights, row["weight"])
        flight = dataclasses.replace(flight, residuals=kept)
    else:
        flight = add_chunk(tick, flight, active, v, weights)
    flight = add_sides(tick, flight, active, m, v, smooth, d_soft)
    flight = add_first(tick, flight, active, m, v, d_x)
    arrived = tick.place.stages([jnp.roll(g, -1, axis=0) for g in d_x])
    return dataclasses.replace(
        flight, gradients=put(flight.gradients, arrived, row["gradient_arrival"])
    )


def pullback(
    tick: Tick, chunk: list, states: list, sides: list, smooth: list[int], v: jax.Array, x: list
) -> tuple[list, Callable[[list], tuple[list, list, list]]]:
    """The stages' outputs again, and `gradient of outputs -> (weights, sides, inputs)`.

    `weights` is the parameters' gradient, or what slot W needs to compute it.
    """
    soft = [sides[n] for n in smooth]
    floats = [a for a in x if is_float(a)]
    if tick.schedule.splits_weight:
        return split_pullback(tick, chunk, states, sides, smooth, v, x)

    def stage(params: list[Any], soft: list[Any], floats: list[Any]) -> tuple[list, list]:
        y, _ = tick.stages.run(params, states, replaced(sides, smooth, soft), v, merge(x, floats))
        return floats_first(y)

    y, pull, others = jax.vjp(stage, chunk, soft, floats, has_aux=True)
    return merge_like(x, y, others), widen(pull, lambda out: out[0])


def split_pullback(
    tick: Tick, chunk: list, states: list, sides: list, smooth: list[int], v: jax.Array, x: list
) -> tuple[list, Callable[[list], tuple[list, list, list]]]:
    """`pullback` for a backward cut in two: `weights` is the residual."""
    cut = cut_stage(tick, chunk, states, sides, smooth, x)
    floats = [a for a in x if is_float(a)]
    soft = [*(sides[n] for n in smooth), *floats]
    given = [
        *tick.stages.prepare(chunk), *soft, *states, *sides, *x, tick.stages.first_layer(v),
    ]  # fmt: skip
    over = lambda fn, args: jax.vmap(fn, spmd_axis_name=AXIS)(*args)
    out = over(cut.forward, given)
    y, kept = out[: cut.num_outputs], out[cut.num_outputs :]

    def pull(g: list) -> tuple[list, list, list]:
        out = over(cut.inputs, [*given, *kept, *g])
        grads, residual = out[: cut.num_input_grads], out[cut.num_input_grads :]
        return residual, grads[: len(smooth)], grads[len(smooth) :]

    return merge_like(x, y[: len(floats)], y[len(floats) :]), pull


def cut_stage(
    tick: Tick, chunk: list, states: list, sides: list, smooth: list[int], x: list
) -> SplitBackward:
    """The backward of one stage cut in two; `[P, ...]` arguments give the types."""
    num_soft, num_states, num_sides = len(smooth), len(states), len(sides)

    def stage(params: list, soft: list, fixed: list) -> tuple[list, list]:
        states, rest = fixed[:num_states], fixed[num_states:]
        values = replaced(rest[:num_sides], smooth, soft[:num_soft])
        carry = merge(rest[num_sides : num_sides + len(x)], soft[num_soft:])
        return floats_first(tick.stages.one(params, states, values, rest[-1], carry)[0])

    one = lambda xs: [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in xs]
    floats = [a for a in x if is_float(a)]
    start = [jax.ShapeDtypeStruct((), jnp.int32)]
    params = jax.eval_shape(tick.stages.prepare, chunk)
    soft = [sides[n] for n in smooth]
    return split_backward(
        stage, one(params), one([*soft, *floats]), [*one([*states, *sides, *x]), *start]
    )


def weights(tick: Tick, flight: Flight, row: Row, blocks: list[Any]) -> Flight:
    """Slot W: weight gradients from what slot B kept."""
    active, v = row["W"] >= 0, jnp.maximum(row["Wv"], 0)
    cut = cut_of(tick, flight, blocks)
    kept = take(flight.residuals, row["weight_read"])

    def gradients(chunk: list, kept: list) -> list:
        prepared, pull = jax.vjp(tick.stages.prepare, chunk)
        return pull(jax.vmap(cut.weights, spmd_axis_name=AXIS)(*prepared, *kept))[0]

    return add_chunk(tick, flight, active, v, widen(gradients)(take(blocks, v), kept))


def cut_of(tick: Tick, flight: Flight, blocks: list[Any]) -> SplitBackward:
    """The cut backward from the types of what the loop carries."""
    p = tick.schedule.num_stages
    one = lambda xs: [jax.ShapeDtypeStruct((p, *a.shape[2:]), a.dtype) for a in xs]
    zeros = jnp.zeros(p, jnp.int32)
    sides = jax.eval_shape(lambda: tick.stages.sides(lambda m: tick.outer.at(m, {}), zeros, zeros))
    smooth = [n for n, grad in enumerate(tick.stages.model.side_grads) if grad]
    return cut_stage(tick, one(blocks), one(flight.input_states), sides, smooth, one(flight.inputs))


def add_chunk(tick: Tick, flight: Flight, active: jax.Array, v: jax.Array, grads: list) -> Flight:
    """Add gradients of every stage\'s chunk to its virtual stage\'s sums."""
    old = take(flight.grads, v)
    return dataclasses.replace(flight, grads=put(flight.grads, add(old, active, grads), v))
