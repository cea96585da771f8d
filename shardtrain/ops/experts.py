"""Mixture of experts: tokens go to the devices that have their experts, and come back.

Design: each row of the batch fills its own places per expert (a row is a group, Lepikhin et al.
2020), so no example depends on another. Rows are sharded over the batch axes, `expert` among them;
asking for the places with `expert` on the experts' dim instead is one all-to-all, and one back.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from shardtrain.errors import ModelError
from shardtrain.ops.here import here

AXIS = "expert"


def capacity_of(length: int, experts_per_token: int, num_experts: int, factor: float) -> int:
    """Places per expert and row: `factor` times what even routing needs, at most the row's length.

    A factor of `num_experts / experts_per_token` or more never drops a token.
    """
    return min(length, math.ceil(length * experts_per_token / num_experts * factor))


def top_experts(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` over the last dim, one choice after another.

    The compilers' own top-k is gathered from all devices first.

    Args:
      scores: float `[B, T, E]`.
      k: Choices per token.

    Returns:
      Scores and expert numbers, `[B, T, k]` each, best first; of equal ones the first.
    """
    left, best, chosen = scores, [], []
    for _ in range(k):
        number = jnp.argmax(left, axis=-1)
        picked = jax.nn.one_hot(number, scores.shape[-1], dtype=bool)
        best.append(jnp.sum(jnp.where(picked, scores, 0), axis=-1))
        chosen.append(number.astype(jnp.int32))
        left = jnp.where(picked, -jnp.inf, left)
    return jnp.stack(best, axis=-1), jnp.stack(chosen, axis=-1)


def dispatch_experts(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    experts: Callable[[jax.Array], jax.Array],
    num_experts: int,
    capacity: int,
) -> tuple[jax.Array, jax.Array]:
    """Apply to every token its chosen experts, and add up their results.

    First choices are placed before second ones, earlier tokens before later ones; what finds no
    place adds nothing.

    Args:
      x: `[B, T, D]`.
      chosen: int `[B, T, k]`, experts of each token, best first, all different.
      weights: float `[B, T, k]`.
      experts: `[E, n, D] -> [E, n, D]`: slice e is what expert e makes of n vectors, some of
        them zeros.
      num_experts: E.
      capacity: Places per expert and row, C; T is dropless.

    Returns:
      `[B, T, D]`, and the share of choices that found no place, `[B]`.

    Raises:
      ModelError: The shapes do not fit, or the mesh axis `expert` does not divide E.

    Example:
      >>> x, one = jnp.ones((1, 3, 2)), jnp.ones((1, 3, 1))
      >>> y, dropped = dispatch_experts(x, jnp.zeros((1, 3, 1), int), one, lambda v: 2 * v, 2, 3)
      >>> y.tolist()[0][0], dropped.tolist()
      ([2.0, 2.0], [0.0])
    """
    rows, _, width = x.shape
    if chosen.shape != weights.shape or chosen.shape[:2] != x.shape[:2] or chosen.ndim != 3:
        raise ModelError(
            f"dispatch_experts: x {x.shape}, chosen {chosen.shape} and weights {weights.shape} "
            "must be [B, T, D], [B, T, k] and [B, T, k]"
        )
    place = here()
    if num_experts % place.size(AXIS):
        raise ModelError(
            f"dispatch_experts: expert={place.size(AXIS)} does not divide {num_experts} experts"
        )
    slot = _places(chosen, num_experts, capacity)
    filled = _fill(x, slot, num_experts * capacity)
    filled = filled.reshape(rows, num_experts, capacity, width)
    # A plan that computes one gradient per replica has taken some axes off the batch.
    stay = tuple(a for a in place.batch_axes if a != AXIS)
    moves = AXIS in place.batch_axes
    lay = lambda v, *spec: place.constrain(v, *spec) if moves else v
    filled = lay(lay(filled, place.batch_axes), stay, AXIS)
    sent = lay(jnp.moveaxis(filled, 1, 0), AXIS, stay)
    made = experts(sent.reshape(num_experts, rows * capacity, width))
    made = lay(made.reshape(num_experts, rows, capacity, width), AXIS, stay)
    back = lay(lay(jnp.moveaxis(made, 0, 1), stay, AXIS), place.batch_axes)
    back = back.reshape(rows, num_experts * capacity, width)
    # One choice at a time: [B, T, k, D] would be k times the residual stream.
    result = jnp.zeros_like(x)
    for j in range(chosen.shape[2]):
        result += _take(back, slot[..., j]) * weights[..., j, None].astype(x.dtype)
    dropped = jnp.mean(slot == num_experts * capacity, axis=(1, 2), dtype=jnp.float32)
    return result, dropped


def _places(chosen: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """Of each choice its place among the row's `E * C`, `E * C` if there is none; `[B, T, k]`."""
    rows, length, k = chosen.shape
    # Choice by choice, then token by token.
    flat = jnp.swapaxes(chosen, 1, 2).reshape(rows, k * length)
    wanted = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32)
    queue = jnp.sum((jnp.cumsum(wanted, axis=1) - 1) * wanted, axis=-1)
    slot = jnp.where(queue < capacity, flat * capacity + queue, num_experts * capacity)
    return jnp.swapaxes(slot.reshape(rows, k, length), 1, 2)


@functools.partial(jax.vmap, in_axes=(0, 0, None))
def _fill(x: jax.Array, slot: jax.Array, places: int) -> jax.Array:
    """`[T, D], [T, k] -> [places, D]`, zero where no token is."""
    empty = jnp.zeros((places, x.shape[1]), x.dtype)
    for j in range(slot.shape[1]):
        empty = empty.at[slot[:, j]].add(x, mode="drop")
    return empty


@jax.vmap
def _take(back: jax.Array, slot: jax.Array) -> jax.Array:
    """`[places, D], [T] -> [T, D]`, zero for a token without a place."""
    return back.at[slot].get(mode="fill", fill_value=0)
