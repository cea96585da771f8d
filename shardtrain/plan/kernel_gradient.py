"""The kernel gradient of a grouped convolution, written as contractions.

Same sums as XLA's own (which uses `batch_group_count`), but one contraction over batch and
positions per kernel offset: the partitioner splits those rightly on every mesh.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def kernel_gradient(
    lhs: jax.Array, grad: jax.Array, shape: tuple[int, ...], dtype: Any, p: dict[str, Any]
) -> jax.Array:
    """d(loss)/d(kernel) of a grouped convolution: one contraction per kernel offset.

    Args:
      lhs: Input of the convolution.
      grad: d(loss)/d(output).
      shape: Kernel shape.
      dtype: Kernel dtype.
      p: Parameters of the `conv_general_dilated` equation.
    """
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    # Batch and features first, spatial dims after them: the order of the specs.
    x, g = jnp.transpose(lhs, numbers.lhs_spec), jnp.transpose(grad, numbers.out_spec)
    window = [shape[d] for d in numbers.rhs_spec[2:]]
    spread = [(lo, hi, n - 1) for (lo, hi), n in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *spread])
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    g = g.reshape(g.shape[0], groups, -1, *g.shape[2:])
    parts = []
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, p["rhs_dilation"], strict=True)]
        strides = p["window_strides"]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, g.shape[3:], strides, strict=True)]
        seen = lax.slice(x, [0, 0, 0, *start], [*x.shape[:3], *stop], [1, 1, 1, *strides])
        parts.append(_contract(seen, g))
    # [offsets, groups, out, in] -> [out features, in features, *window] -> the kernel's own order.
    stacked = jnp.stack(parts).reshape(*window, -1, x.shape[2])
    ordered = jnp.moveaxis(stacked, (-2, -1), (0, 1))
    return jnp.transpose(ordered, _inverse(numbers.rhs_spec)).astype(dtype)


def _contract(x: jax.Array, g: jax.Array) -> jax.Array:
    """`[n, groups, in, ...], [n, groups, out, ...] -> [groups, out, in]`, in float32."""
    if x.shape[2] == g.shape[2] == 1:  # depthwise: a sum of products, no matmul
        product = x.astype(jnp.float32) * g.astype(jnp.float32)
        return jnp.sum(product, axis=(0, *range(3, x.ndim)))[..., None]
    flat = lambda v: v.reshape(*v.shape[:3], -1)
    return jnp.einsum("ngis,ngos->goi", flat(x), flat(g), preferred_element_type=jnp.float32)


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(i) for i in range(len(order))]
