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
from shardtrain.ops.online_softmax import Sums, add_block, block_gradients, finish, nothing
from shardtrain.ops.zigzag import from_zigzag, to_zigzag

AXIS = "context"
Arrays = tuple[jax.Array, ...]


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
        wide, log_total = finish(add_block(nothing(q), q, k, v, _triangle(q, causal)))
        out = wide.astype(v.dtype)
        return out, (q, k, v, out, log_total)
    body = functools.partial(_ring_forward, n=n, causal=causal)
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
        found = block_gradients(q, k, v, _triangle(q, causal), log_total, wide, dot)
    else:
        body = functools.partial(_ring_backward, n=n, causal=causal)
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


def _triangle(q: jax.Array, causal: bool) -> jax.Array | None:
    return jnp.tri(q.shape[1], dtype=bool) if causal else None


def _turn(arrays: Arrays, n: int) -> Arrays:
    """Each device gets what the one before it has."""
    ring = [(i, (i + 1) % n) for i in range(n)]
    return tuple(jax.lax.ppermute(x, AXIS, ring) for x in arrays)


def _ring_forward(
    number: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *, n: int, causal: bool
) -> Arrays:
    """The output, and what the backward pass needs, in the order it needs it."""
    if not causal:
        kept = q, k, v
        sums = add_block(nothing(q), q, k, v)
        for _ in range(1, n):
            k, v = _turn((k, v), n)
            sums = add_block(sums, q, k, v)
        out, log_total = finish(sums)
        return (out.astype(v.dtype), *kept, log_total)
    i = number[0]
    q, k, v = kept = tuple(to_zigzag(x, i, n, 1) for x in (q, k, v))
    early, late = _first(q, k, v)
    for step in range(1, n):
        k, v = _turn((k, v), n)
        early, late = _later(early, late, q, k, v, before=i >= step)
    out, log_total = zip(finish(early), finish(late), strict=True)
    joined = from_zigzag(jnp.concatenate(out, 1).astype(v.dtype), i, n, 1)
    return (joined, *kept, jnp.concatenate(log_total, -1))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    first, second = jnp.split(x, 2, axis=1)
    return first, second


def _first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Sums, Sums]:
    """A device's own pieces: early sees itself, late sees early and itself."""
    (qa, qb), (ka, kb), (va, vb) = _halves(q), _halves(k), _halves(v)
    own = _triangle(qa, True)
    early = add_block(nothing(qa), qa, ka, va, own)
    late = add_block(nothing(qb), qb, kb, vb, own)
    return early, add_block(late, qb, ka, va)


def _later(
    early: Sums, late: Sums, q: jax.Array, k: jax.Array, v: jax.Array, before: jax.Array
) -> tuple[Sums, Sums]:
    """Another device's pieces: the late queries see its early piece. Besides, if its early piece
    comes `before`, the early queries see that; if not, the late queries see its late piece."""
    (qa, qb), (ka, kb), (va, vb) = _halves(q), _halves(k), _halves(v)
    choose = functools.partial(jax.tree.map, lambda a, b: jnp.where(before, a, b))
    late = add_block(late, qb, ka, va)
    more = add_block(choose(early, late), *choose((qa, ka, va), (qb, kb, vb)))
    return choose(more, early), choose(late, more)


def _ring_backward(
    number: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_total: jax.Array,
    grad: jax.Array,
    dot: jax.Array,
    *,
    n: int,
    causal: bool,
) -> Arrays:
    """Gradients; those of keys and values travel with them, and then home."""
    i = number[0]
    if causal:
        grad, dot = to_zigzag(grad, i, n, 1), to_zigzag(dot, i, n, 3)
        early, late = _queries(q, grad, log_total, dot)
        sums = _first_gradients(early, late, k, v)
    else:
        whole = (q, log_total, grad.astype(jnp.float32), dot)
        sums = _gradients(whole, k, v, None)
    for step in range(1, n):
        dq, *back = sums
        k, v, dk, dv = _turn((k, v, *back), n)
        if causal:
            more = _later_gradients(early, late, k, v, before=i >= step)
        else:
            more = _gradients(whole, k, v, None)
        sums = tuple(a + b for a, b in zip((dq, dk, dv), more, strict=True))
    found = (sums[0], *_turn(sums[1:], n))
    return tuple(from_zigzag(x, i, n, 1) for x in found) if causal else found


def _queries(
    q: jax.Array, grad: jax.Array, log_total: jax.Array, dot: jax.Array
) -> tuple[Arrays, Arrays]:
    """(query, log_total, grad, dot) of the early and of the late piece."""
    wide = _halves(grad.astype(jnp.float32))
    columns = [jnp.split(x, 2, axis=-1) for x in (log_total, dot)]
    early, late = ((_halves(q)[i], columns[0][i], wide[i], columns[1][i]) for i in (0, 1))
    return early, late


def _gradients(queries: Arrays, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> Arrays:
    q, log_total, grad, dot = queries
    return block_gradients(q, k, v, mask, log_total, grad, dot)


def _joined(early: jax.Array | float, late: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.broadcast_to(early, late.shape), late], axis=1)


def _first_gradients(early: Arrays, late: Arrays, k: jax.Array, v: jax.Array) -> Arrays:
    (ka, kb), (va, vb) = _halves(k), _halves(v)
    own = _triangle(early[0], True)
    aa, bb = _gradients(early, ka, va, own), _gradients(late, kb, vb, own)
    ba = _gradients(late, ka, va, None)
    return (
        _joined(aa[0], bb[0] + ba[0]),
        _joined(aa[1] + ba[1], bb[1]),
        _joined(aa[2] + ba[2], bb[2]),
    )


def _later_gradients(
    early: Arrays, late: Arrays, k: jax.Array, v: jax.Array, before: jax.Array
) -> Arrays:
    (ka, kb), (va, vb) = _halves(k), _halves(v)
    choose = functools.partial(jax.tree.map, lambda a, b: jnp.where(before, a, b))
    ba = _gradients(late, ka, va, None)
    more = _gradients(choose(early, late), *choose((ka, va), (kb, vb)), None)
    to_early = lambda x: jnp.where(before, x, 0.0)
    to_late = lambda x: jnp.where(before, 0.0, x)
    return (
        _joined(to_early(more[0]), ba[0] + to_late(more[0])),
        _joined(ba[1] + to_early(more[1]), to_late(more[1])),
        _joined(ba[2] + to_early(more[2]), to_late(more[2])),
    )
