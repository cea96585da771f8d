"""Convolutions and their kernel gradients, written as contractions that partition rightly.

Same sums as XLA's own convolution and, for the kernel gradient, its convolution over the batch:
one contraction per kernel offset; where windows do not overlap (the patches of a vision
transformer) one in all.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def num_offsets(shape: tuple[int, ...], p: dict[str, Any]) -> int:
    """How many positions a kernel has, each a contraction of the convolution.

    Args:
      shape: Kernel shape.
      p: Parameters of the `conv_general_dilated` equation.
    """
    return math.prod(_window(shape, p))


def num_contractions(shape: tuple[int, ...], p: dict[str, Any]) -> int:
    """How many contractions the kernel gradient of a convolution takes.

    Args:
      shape: Kernel shape.
      p: Parameters of the `conv_general_dilated` equation.
    """
    return 1 if _non_overlapping(_window(shape, p), p) else num_offsets(shape, p)


def contracted_convolution(lhs: jax.Array, rhs: jax.Array, p: dict[str, Any]) -> jax.Array:
    """A convolution as a sum over kernel offsets, each a contraction over the features of a group.

    Args:
      lhs: Input.
      rhs: Kernel.
      p: Parameters of the `conv_general_dilated` equation.
    """
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    x, window = _padded(lhs, p), _window(rhs.shape, p)
    k = jnp.transpose(rhs, numbers.rhs_spec)
    k = k.reshape(groups, -1, k.shape[1], math.prod(window))
    spans = [(n - 1) * d + 1 for n, d in zip(window, p["rhs_dilation"], strict=True)]
    steps = zip(x.shape[3:], spans, p["window_strides"], strict=True)
    positions = [(n - span) // stride + 1 for n, span, stride in steps]
    out = sum(
        jnp.einsum("ngi...,goi->ngo...", seen, k[..., i], preferred_element_type=jnp.float32)
        for i, seen in enumerate(_offsets(x, positions, window, p))
    )
    assert isinstance(out, jax.Array)  # a kernel has at least one offset
    out = out.reshape(out.shape[0], -1, *positions)
    dtype = p["preferred_element_type"] or jnp.result_type(lhs, rhs)
    return jnp.transpose(out, _inverse(numbers.out_spec)).astype(dtype)


def kernel_gradient(
    lhs: jax.Array, grad: jax.Array, shape: tuple[int, ...], dtype: Any, p: dict[str, Any]
) -> jax.Array:
    """d(loss)/d(kernel) of a convolution.

    Args:
      lhs: Input of the convolution.
      grad: d(loss)/d(output).
      shape: Kernel shape.
      dtype: Kernel dtype.
      p: Parameters of the `conv_general_dilated` equation.
    """
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    x, g, window = _padded(lhs, p), jnp.transpose(grad, numbers.out_spec), _window(shape, p)
    g = g.reshape(g.shape[0], groups, -1, *g.shape[2:])
    if _non_overlapping(window, p):
        stacked = _contract_patches(x, g, window)
    else:
        stacked = jnp.stack([_contract(seen, g) for seen in _offsets(x, g.shape[3:], window, p)])
    # [offsets, groups, out, in] -> [out features, in features, *window] -> the kernel's own order.
    stacked = stacked.reshape(*window, -1, x.shape[2])
    ordered = jnp.moveaxis(stacked, (-2, -1), (0, 1))
    return jnp.transpose(ordered, _inverse(numbers.rhs_spec)).astype(dtype)


def _window(shape: tuple[int, ...], p: dict[str, Any]) -> list[int]:
    return [shape[d] for d in p["dimension_numbers"].rhs_spec[2:]]


def _padded(lhs: jax.Array, p: dict[str, Any]) -> jax.Array:
    """The input as `[batch, groups, features, *positions]`, padded and spread out."""
    x = jnp.transpose(lhs, p["dimension_numbers"].lhs_spec)
    spread = [(lo, hi, n - 1) for (lo, hi), n in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *spread])
    return x.reshape(x.shape[0], p["feature_group_count"], -1, *x.shape[2:])


def _offsets(
    x: jax.Array, positions: Sequence[int], window: Sequence[int], p: dict[str, Any]
) -> Iterator[jax.Array]:
    """For each offset in the kernel, what it sees at every output position."""
    strides = p["window_strides"]
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, p["rhs_dilation"], strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, positions, strides, strict=True)]
        yield lax.slice(x, [0, 0, 0, *start], [*x.shape[:3], *stop], [1, 1, 1, *strides])


def _non_overlapping(window: Sequence[int], p: dict[str, Any]) -> bool:
    """Each input position is read once at most, by one output position."""
    dense = all(d == 1 for d in (*p["lhs_dilation"], *p["rhs_dilation"]))
    padded = any(n != 0 for pair in p["padding"] for n in pair)
    return dense and not padded and tuple(window) == tuple(p["window_strides"])


def _contract_patches(x: jax.Array, g: jax.Array, window: Sequence[int]) -> jax.Array:
    """`[n, groups, in, ...], [n, groups, out, ...] -> [offsets, groups, out, in]`."""
    positions, dims = g.shape[3:], range(len(window))
    x = x[..., *(slice(0, k * w) for k, w in zip(positions, window, strict=True))]
    split = [size for pair in zip(positions, window, strict=True) for size in pair]
    patches = x.reshape(*x.shape[:3], *split)
    order = (*(4 + 2 * d for d in dims), 0, 1, 2, *(3 + 2 * d for d in dims))
    patches = jnp.transpose(patches, order).reshape(-1, *x.shape[:3], math.prod(positions))
    g = g.reshape(*g.shape[:3], -1)
    return jnp.einsum("wngis,ngos->wgoi", patches, g, preferred_element_type=jnp.float32)


def _contract(x: jax.Array, g: jax.Array) -> jax.Array:
    """`[n, groups, in, ...], [n, groups, out, ...] -> [groups, out, in]`, in float32."""
    if x.shape[2] == g.shape[2] == 1:  # depthwise: a sum of products, no matmul
        product = x.astype(jnp.float32) * g.astype(jnp.float32)
        return jnp.sum(product, axis=(0, *range(3, x.ndim)))[..., None]
    flat = lambda v: v.reshape(*v.shape[:3], -1)
    return jnp.einsum("ngis,ngos->goi", flat(x), flat(g), preferred_element_type=jnp.float32)


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(i) for i in range(len(order))]
