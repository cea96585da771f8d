"""The two rings of ring attention, as one device runs them."""

import functools

import jax
import jax.numpy as jnp

from shardtrain.ops.online_softmax import Sums, add_block, block_gradients, finish, nothing
from shardtrain.ops.zigzag import from_zigzag, to_zigzag

AXIS = "context"
Arrays = tuple[jax.Array, ...]


def triangle(q: jax.Array, causal: bool) -> jax.Array | None:
    """Which keys a query sees, or None for all."""
    return jnp.tri(q.shape[1], dtype=bool) if causal else None


def _turn(arrays: Arrays, n: int) -> Arrays:
    """Each device gets what the one before it has."""
    ring = [(i, (i + 1) % n) for i in range(n)]
    return tuple(jax.lax.ppermute(x, AXIS, ring) for x in arrays)


def ring_forward(
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
    own = triangle(qa, True)
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


def ring_backward(
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
    own = triangle(early[0], True)
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
