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
from shardtrain.pipeline.residual import Residual
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
    store = flight.residuals, row["weight"]
    y, pull = pullback(tick, chunk, states, sides, smooth, v, x, store)
    flight, loss_grad = head(tick, flight, m, active, v, y)
    last = jnp.arange(tick.schedule.num_stages) == tick.schedule.num_stages - 1
    last = last & (v == tick.schedule.virtual_stages - 1)
    gradients = put(flight.gradients, flight.sent_gradients, row["gradient_arrival"])
    g = take(gradients, row["gradient"])
    g = where(last, [jnp.broadcast_to(h, a.shape) for h, a in zip(loss_grad, g, strict=True)], g)
    weights, d_soft, d_x = pull(tick.place.stages(g))
    d_x = tick.place.stages(d_x)
    if tick.schedule.splits_weight:
        flight = dataclasses.replace(flight, residuals=weights)
    else:
        flight = add_chunk(tick, flight, active, v, weights)
    flight = add_sides(tick, flight, active, m, v, smooth, d_soft)
    flight = add_first(tick, flight, active, m, v, d_x)
    sent = tick.place.stages([jnp.roll(g, -1, axis=0) for g in d_x])
    return dataclasses.replace(flight, gradients=gradients, sent_gradients=sent)


def pullback(
    tick: Tick,
    chunk: list,
    states: list,
    sides: list,
    smooth: list[int],
    v: jax.Array,
    x: list,
    store: tuple[Residual, jax.Array],
) -> tuple[list, Callable[[list], tuple[Any, list, list]]]:
    """The stages' outputs again, and `gradient of outputs -> (weights, sides, inputs)`.

    `weights` is the parameters' gradient, or what slot W needs to compute it.
    """
    soft = [sides[n] for n in smooth]
    floats = [a for a in x if is_float(a)]
    if tick.schedule.splits_weight:
        return split_pullback(tick, chunk, states, sides, smooth, v, x, store)

    def stage(params: list[Any], soft: list[Any], floats: list[Any]) -> tuple[list, list]:
        y, _ = tick.stages.run(params, states, replaced(sides, smooth, soft), v, merge(x, floats))
        return floats_first(y)

    y, pull, others = jax.vjp(stage, chunk, soft, floats, has_aux=True)
    return merge_like(x, y, others), widen(pull, lambda out: out[0])


def split_pullback(
    tick: Tick,
    chunk: list,
    states: list,
    sides: list,
    smooth: list[int],
    v: jax.Array,
    x: list,
    store: tuple[Residual, jax.Array],
) -> tuple[list, Callable[[list], tuple[Residual, list, list]]]:
    """`pullback` for a backward cut in two: `weights` is the residual."""
    cut = cut_stage(tick, chunk, states, sides, smooth, x)
    over = lambda fn, *args: jax.vmap(fn, spmd_axis_name=AXIS)(*args)
    shared, layered = over(tick.stages.inputs, states, sides, tick.stages.first_layer(v))
    params = tick.stages.prepare(chunk)
    y, kept = over(cut.forward, params, shared, layered, x)

    def pull(g: list) -> tuple[Residual, list, list]:
        grads, residual = over(cut.inputs, params, shared, layered, kept, g, *store)
        d_shared, d_layered, d_x = grads
        return residual, [*d_shared, *d_layered], d_x

    return y, pull


def cut_stage(
    tick: Tick, chunk: list, states: list, sides: list, smooth: list[int], x: list
) -> SplitBackward:
    """The backward of one stage cut in two; `[P, ...]` arguments give the types."""
    stages = tick.stages
    one = lambda xs: [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in xs]
    start = jax.ShapeDtypeStruct((), jnp.int32)
    shared, layered = jax.eval_shape(stages.inputs, one(states), one(sides), start)
    before = 1 + len(states)  # in `layered`, the index and the states come before the sides
    return split_backward(
        lambda *given: stages.layer(stages.model.block, *given)[0],
        one(jax.eval_shape(stages.prepare, chunk)), shared, layered, one(x),
        ([n for n in smooth if n < len(shared)],
         [n - len(shared) + before for n in smooth if n >= len(shared)]),
    )  # fmt: skip


def weights(tick: Tick, flight: Flight, row: Row, blocks: list[Any]) -> Flight:
    """Slot W: weight gradients from what slot B kept."""
    active, v = row["W"] >= 0, jnp.maximum(row["Wv"], 0)
    cut = cut_of(tick, flight, blocks)
    read = row["weight_read"]
    kept = Residual(take(flight.residuals.once, read), take(flight.residuals.layers, read))

    def gradients(chunk: list, kept: Residual) -> list:
        prepared, pull = jax.vjp(tick.stages.prepare, chunk)
        return pull(jax.vmap(cut.weights, spmd_axis_name=AXIS)(prepared, kept))[0]

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
