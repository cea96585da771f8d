"""Attention block by block: softmax statistics that are merged as keys arrive, in float32.

Milakov and Gimelshein 2018; Dao et al. 2022. Shapes: `B` rows, `T` queries, `S` keys, `K` key/value
heads, `G` query heads per key/value head, `H` head dim.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

NEVER = -1e30
"""Score of a key that is not seen: finite, so that a row without keys stays finite."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """What is known of attention after some of the keys; float32.

    Args:
      top: `[B, K, G, T]`, the largest score.
      total: `[B, K, G, T]`, sum of `exp(score - top)`.
      mixed: `[B, T, K, G, H]`, sum of `exp(score - top) * value`.
    """

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


def nothing(query: jax.Array) -> Sums:
    """Before the first key.

    Args:
      query: `[B, T, K, G, H]`.
    """
    rows, length, heads, group, _ = query.shape
    top = jnp.full((rows, heads, group, length), NEVER, jnp.float32)
    return Sums(top, jnp.zeros_like(top), jnp.zeros(query.shape, jnp.float32))


def scores_of(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`[B, K, G, T, S]` in float32, scaled by the root of the head dim.

    Args:
      query: `[B, T, K, G, H]`.
      key: `[B, S, K, H]`.
      mask: `[T, S]`, True where a query sees a key; None: everywhere.
    """
    found = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    found = found * query.shape[-1] ** -0.5
    return found if mask is None else jnp.where(mask, found, NEVER)


def add_block(
    sums: Sums, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> Sums:
    """The sums with a block of keys and values added."""
    scores = scores_of(query, key, mask)
    top = jnp.maximum(sums.top, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None])
    if mask is not None:  # a row that has seen nothing yet has top == NEVER, and exp(0) is 1
        weights = jnp.where(mask, weights, 0.0)
    kept = jnp.exp(sums.top - top)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(jnp.float32))
    return Sums(
        top,
        sums.total * kept + jnp.sum(weights, axis=-1),
        sums.mixed * _by_query(kept) + mixed,
    )


def finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """The attention `[B, T, K, G, H]` and the log of the softmax denominator `[B, K, G, T]`."""
    return sums.mixed / _by_query(sums.total), sums.top + jnp.log(sums.total)


def block_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    log_total: jax.Array,
    grad: jax.Array,
    dot: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one block of keys adds to d(query), d(key), d(value); float32.

    Args:
      query: `[B, T, K, G, H]`.
      key: `[B, S, K, H]`.
      value: `[B, S, K, H]`.
      mask: As in `scores_of`.
      log_total: From `finish`.
      grad: d(loss)/d(attention), `[B, T, K, G, H]` float32.
      dot: `[B, K, G, T]`, the sum over H of attention times `grad`.
    """
    weights = jnp.exp(scores_of(query, key, mask) - log_total[..., None])
    along = jnp.einsum("btkgh,bskh->bkgts", grad, value.astype(jnp.float32))
    change = weights * (along - dot[..., None]) * query.shape[-1] ** -0.5
    return (
        jnp.einsum("bkgts,bskh->btkgh", change, key.astype(jnp.float32)),
        jnp.einsum("bkgts,btkgh->bskh", change, query.astype(jnp.float32)),
        jnp.einsum("bkgts,btkgh->bskh", weights, grad),
    )


def _by_query(x: jax.Array) -> jax.Array:
    """`[B, K, G, T] -> [B, T, K, G, 1]`."""
    return jnp.moveaxis(x, -1, 1)[..., None]
