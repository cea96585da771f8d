"""Cross-entropy straight from hidden states: the logits exist for a chunk of positions at a time.

Design: with a vocabulary of 128 thousand, the logits and their gradient are often the largest
arrays of a step. Here each chunk's logits, and the gradients that follow from them, are computed in
the forward pass and only the gradients are kept (as in Liger kernels, Hsu et al. 2024): the work is
that of the plain loss. Everything happens on each device's own rows; over a vocabulary sharded over
`tensor` only two numbers per position are exchanged (Shoeybi et al. 2019, section 3), and the
gradient of the kernel is summed over the batch once, not once per chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.errors import ModelError
from shardtrain.modules import Mean
from shardtrain.ops.here import Here, here

Parts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def chunked_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    num_chunks: int = 8,
) -> Mean:
    """`cross_entropy(hidden @ kernel, targets, mask)` without the logits.

    Args:
      hidden: `[B, T, D]`, any float dtype.
      kernel: `[D, V]`; the vocabulary may be sharded over `tensor`.
      targets: int `[B, T]`.
      mask: `[B, T]` weights, 0 ignores a position; None counts every position once.
      num_chunks: The largest number of chunks to use; the nearest below that divides a device's
        positions is taken.

    Returns:
      `Mean(sum of nats, sum of mask)`.

    Raises:
      ModelError: The shapes do not fit.

    Example:
      >>> h, w = jnp.ones((1, 4, 2)), jnp.zeros((2, 8))
      >>> round(float(chunked_cross_entropy(h, w, jnp.zeros((1, 4), jnp.int32)).value), 4)
      2.0794
    """
    if (
        hidden.ndim != 3
        or kernel.shape[:1] != hidden.shape[2:]
        or targets.shape != hidden.shape[:2]
    ):
        raise ModelError(
            f"chunked_cross_entropy: hidden {hidden.shape}, kernel {kernel.shape} and targets "
            f"{targets.shape} must be [B, T, D], [D, V] and [B, T]"
        )
    if mask is not None and mask.shape != targets.shape:
        raise ModelError(f"chunked_cross_entropy: mask {mask.shape}, targets {targets.shape}")
    weights = jnp.ones(targets.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    seen = weights != 0  # masked positions may hold anything: infinities, a target of -100
    hidden = jnp.where(seen[..., None], hidden, 0)
    targets = jnp.where(seen, targets, 0)
    place = here()
    parts = _parts(place, hidden.shape, kernel.shape[1])
    local = hidden.shape[1] // place.size(parts[1])
    chunks = next(n for n in range(min(num_chunks, local), 0, -1) if local % n == 0)
    total = _nats(hidden, kernel, targets, jax.lax.stop_gradient(weights), place, parts, chunks)
    return Mean(total, jnp.sum(weights))


def _parts(place: Here, shape: tuple[int, ...], vocab: int) -> Parts:
    """Mesh axes of rows, positions and vocabulary, where they divide."""
    fits = lambda axes, size: axes if size % place.size(axes) == 0 else ()
    named = lambda axis: (axis,) if place.size(axis) > 1 else ()
    return (
        fits(place.batch_axes, shape[0]),
        fits(named("context"), shape[1]),
        fits(named("tensor"), vocab),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _nats(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    place: Here,
    parts: Parts,
    chunks: int,
) -> jax.Array:
    total, _ = _run(hidden, kernel, targets, weights, place, parts, chunks, False)
    return total


def _forward(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    place: Here,
    parts: Parts,
    chunks: int,
) -> Any:
    total, (dh, dw) = _run(hidden, kernel, targets, weights, place, parts, chunks, True)
    return total, (dh, dw.astype(kernel.dtype), weights)


def _backward(place: Here, parts: Parts, chunks: int, saved: Any, grad: jax.Array) -> Any:
    dh, dw, weights = saved
    scaled = [(x.astype(jnp.float32) * grad).astype(x.dtype) for x in (dh, dw)]
    return (*scaled, None, jnp.zeros_like(weights))


_nats.defvjp(_forward, _backward)


def _run(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    place: Here,
    parts: Parts,
    chunks: int,
    grads: bool,
) -> Any:
    """Sum of nats and, with `grads`, (d(hidden), d(kernel)), else ()."""
    rows, positions, vocab = (p or None for p in parts)
    body = functools.partial(_local, place=place, parts=parts, chunks=chunks, grads=grads)
    if place.mesh.empty or not any(parts):
        return body(hidden, kernel, targets, weights)
    ids, states = PartitionSpec(rows, positions), PartitionSpec(rows, positions, None)
    matrix = PartitionSpec(None, vocab)
    return jax.shard_map(
        body,
        mesh=place.mesh,
        in_specs=(states, matrix, ids, ids),
        out_specs=(PartitionSpec(), (states, matrix) if grads else ()),
        check_vma=False,
    )(hidden, kernel, targets, weights)


def _local(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    place: Here,
    parts: Parts,
    chunks: int,
    grads: bool,
) -> Any:
    """One device's rows and its part of the vocabulary, chunk after chunk."""
    (*_, vocab), spread = parts, (*parts[0], *parts[1])
    first = jax.lax.axis_index(vocab) * kernel.shape[1] if vocab else 0
    cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)
    add_up = lambda x, axes: jax.lax.psum(x, axes) if axes else x

    def one(carry: Any, chunk: Any) -> Any:
        total, dw = carry
        h, ids, w = chunk
        logits = jnp.einsum("btd,dv->btv", h, kernel, preferred_element_type=jnp.float32)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        top = jax.lax.pmax(top, vocab) if vocab else top
        shares = jnp.exp(logits - top)
        own = (ids - first)[..., None] == jnp.arange(kernel.shape[1])
        target = jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
        sums = add_up(jnp.stack([jnp.sum(shares, axis=-1), target]), vocab)
        total += jnp.sum((jnp.log(sums[0]) + top[..., 0] - sums[1]) * w)
        if not grads:
            return (total, dw), ()
        dlogits = (shares / sums[0][..., None] - own) * w[..., None]
        dlogits = dlogits.astype(h.dtype)
        dh = jnp.einsum("btv,dv->btd", dlogits, kernel, preferred_element_type=jnp.float32)
        dw += jnp.einsum("btd,btv->dv", h, dlogits, preferred_element_type=jnp.float32)
        return (total, dw), dh

    dw = jnp.zeros(kernel.shape if grads else (), jnp.float32)
    (total, dw), dh = jax.lax.scan(
        one, (jnp.float32(0), dw), (cut(hidden), cut(targets), cut(weights))
    )
    total = add_up(total, spread)
    if not grads:
        return total, ()
    dh = add_up(jnp.moveaxis(dh, 0, 1).reshape(hidden.shape), vocab).astype(hidden.dtype)
    return total, (dh, add_up(dw, spread))
