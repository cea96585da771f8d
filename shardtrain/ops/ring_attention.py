"""Ring attention: keys and values travel around the `context` axis (Liu et al. 2023).

Design: nobody ever has all keys. With a causal mask a contiguous split would leave the first device
idle and the last with twice the mean work; so each device exchanges its part for one early and one
late piece of the sequence (zigzag, as in the Llama 3 report), after which every device has two
unmasked piece-by-piece products in each of the n - 1 later steps, and no step computes what is
masked. Gradients travel a second ring; nothing but inputs, output and one number per query is kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.errors import ModelError
from shardtrain.ops.here import Here, here
from shardtrain.ops.online_softmax import add_block, block_gradients, finish, nothing
from shardtrain.ops.ring_passes import AXIS, Arrays, ring_backward, ring_forward, triangle


def ring_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = True
) -> jax.Array:
    """Softmax attention over a sequence that is sharded over the mesh axis `context`.

    Without such an axis the same sums are computed in one block.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, T, K, H]`; each of the K heads serves N / K query heads.
      value: `[B, T, K, H]`.
      causal: Position t sees positions 0 to t.

    Returns:
      `[B, T, N, H]` in the dtype of `value`; the softmax is float32.

    Raises:
      ModelError: The heads cannot be grouped, or T does not divide.

    Example:
      >>> x = jnp.ones((1, 4, 2, 8))
      >>> ring_attention(x, x, x).shape
      (1, 4, 2, 8)
    """
    rows, length, heads, dim = query.shape
    if heads % key.shape[2] or key.shape != value.shape or key.shape[1] != length:
        raise ModelError(
            f"ring_attention: query {query.shape}, key {key.shape} and value {value.shape}: key "
            "and value must have the query's length, and a number of heads that divides its heads"
        )
    place = here()
    pieces = place.size(AXIS) * (2 if causal and place.size(AXIS) > 1 else 1)
    if length % pieces:
        raise ModelError(
            f"ring_attention: length {length} is not divisible by {pieces} "
            f"({'two pieces' if causal else 'one piece'} for each of context={place.size(AXIS)})"
        )
    grouped = query.reshape(rows, length, key.shape[2], -1, dim)
    return _attention(grouped, key, value, place, causal).reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, place: Here, causal: bool) -> jax.Array:
    return _forward(q, k, v, place, causal)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, place: Here, causal: bool) -> Any:
    n = place.size(AXIS)
    if n == 1:
        wide, log_total = finish(add_block(nothing(q), q, k, v, triangle(q, causal)))
        out = wide.astype(v.dtype)
        return out, (q, k, v, out, log_total)
    body = functools.partial(ring_forward, n=n, causal=causal)
    mapped = _mapped(body, place, (_ROWS,) * 3, (_ROWS, _ROWS, _ROWS, _ROWS, _LINE))
    out, q, k, v, log_total = mapped(jnp.arange(n), q, k, v)
    return out, (q, k, v, out, log_total)


def _backward(place: Here, causal: bool, saved: Any, grad: jax.Array) -> Arrays:
    q, k, v, out, log_total = saved
    n = place.size(AXIS)
    dot = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dot = jnp.moveaxis(dot, 1, -1)
    if n == 1:
        wide = grad.astype(jnp.float32)
        found = block_gradients(q, k, v, triangle(q, causal), log_total, wide, dot)
    else:
        body = functools.partial(ring_backward, n=n, causal=causal)
        specs = (_ROWS, _ROWS, _ROWS, _LINE, _ROWS, _LINE)
        mapped = _mapped(body, place, specs, (_ROWS, _ROWS, _ROWS))
        # Or the compiler would keep all keys and values of the forward ring for this one.
        q, k, v = jax.lax.optimization_barrier((q, k, v))
        found = mapped(jnp.arange(n), q, k, v, log_total, grad, dot)
    return tuple(g.astype(x.dtype) for g, x in zip(found, (q, k, v), strict=True))


_attention.defvjp(_forward, _backward)

_ROWS = PartitionSpec(None, AXIS)
_LINE = PartitionSpec(None, None, None, AXIS)


def _mapped(body: Callable[..., Any], place: Here, in_specs: Any, out_specs: Any) -> Any:
    """`body` on each device's part of the sequence; other mesh axes are left to the partitioner.

    Its first argument is the device's number along `context`, `[1]`.
    """
    return jax.shard_map(
        body,
        mesh=place.mesh,
        in_specs=(PartitionSpec(AXIS), *in_specs),
        out_specs=out_specs,
        axis_names={AXIS},
        check_vma=False,
    )
