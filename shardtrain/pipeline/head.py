"""The loss at the last stage, and gradients that leave the blocks: head, sides, embedding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.pipeline.buffers import where, zeros_like
from shardtrain.pipeline.flight import Flight, Tick, add, is_float, merge
from shardtrain.train.widen import widen


def head(
    tick: Tick, flight: Flight, m: jax.Array, active: jax.Array, v: jax.Array, y: list[Any]
) -> tuple[Flight, list[Any]]:
    """Loss of the microbatch at the last stage, its sums, and the gradient of its carry."""
    on = active[-1] & (v[-1] == tick.schedule.virtual_stages - 1)
    carry = tick.place.microbatch([a[-1] for a in y])
    tree = tick.stages.model.output_tree

    def loss(params: list[Any], floats: list[Any]) -> tuple[Any, list[Any]]:
        out = tick.post(m[-1], merge(carry, floats), flight.post_state, params)
        sums = out[: len(flight.sums)]
        return jax.tree.unflatten(tree, sums).loss.total, out

    def compute() -> tuple[list, list, list]:
        floats = [a for a in carry if is_float(a)]
        gradient = widen(jax.grad(loss, argnums=(0, 1), has_aux=True), lambda out: out[0][0])
        (d_outer, d_carry), out = gradient(tick.outer.params, floats)
        return d_outer, tick.place.microbatch(d_carry), out

    if tick.schedule.virtual_stages == 1:
        d_outer, d_carry, out = compute()
    else:
        idle = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute))
        kept = lambda done: (done[0], tick.place.microbatch(done[1]), done[2])
        d_outer, d_carry, out = jax.lax.cond(on, compute, lambda: kept(idle()))
    count = len(flight.sums)
    sums = where(on, [a + b for a, b in zip(flight.sums, out[:count], strict=True)], flight.sums)
    return dataclasses.replace(
        flight,
        sums=sums,
        post_state=where(on, out[count:], flight.post_state),
        outer_grads=add(flight.outer_grads, on, d_outer),
    ), d_carry


def add_sides(
    tick: Tick, flight: Flight, active: jax.Array, m: Any, v: Any, smooth: list[int], grads: list
) -> Flight:
    """Gradients that reach outer parameters through what blocks read beside the carry."""
    if not smooth:
        return flight

    def again(params: list[Any]) -> list[Any]:
        found = tick.stages.sides(lambda m: tick.outer.at(m, {}, params), m, v)
        return [found[n] for n in smooth]

    _, pull = jax.vjp(again, tick.outer.params)
    (d_outer,) = widen(pull)(where(active, grads, zeros_like(grads)))
    return dataclasses.replace(
        flight, outer_grads=add(flight.outer_grads, jnp.bool_(True), d_outer)
    )


def add_first(
    tick: Tick, flight: Flight, active: jax.Array, m: jax.Array, v: jax.Array, grads: list
) -> Flight:
    """Gradients of what computes the first carry (the embedding)."""
    on = active[0] & (v[0] == 0)
    arrived = tick.place.microbatch([g[0] for g in grads])

    def again(params: list[Any]) -> list[Any]:
        carry = tick.stages.first_carry(tick.outer.at(m[0], {}, params))
        return [x for x in carry if is_float(x)]

    def compute() -> list[Any]:
        _, pull = jax.vjp(again, tick.outer.params)
        return widen(pull)(arrived)[0]

    if tick.schedule.virtual_stages == 1:
        d_outer = compute()
    else:
        d_outer = jax.lax.cond(on, compute, lambda: zeros_like(tick.outer.params))
    return dataclasses.replace(flight, outer_grads=add(flight.outer_grads, on, d_outer))
