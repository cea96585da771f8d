"""Exchange a contiguous split of the sequence for one early and one late piece per device.

The sequence is 2n pieces. Contiguously, device i of n has pieces 2i and 2i + 1; in zigzag order it
has pieces i and 2n - 1 - i, which under a causal mask is the same work for all. First pieces go to
n different devices, and second ones too: two permutes either way.
"""

import jax
import jax.numpy as jnp

AXIS = "context"


def owner(piece: int, n: int) -> int:
    """The device that has a piece in zigzag order."""
    return min(piece, 2 * n - 1 - piece)


def _routes(n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of every device's first piece, and of its second."""
    first, second = ([(i, owner(2 * i + h, n)) for i in range(n)] for h in (0, 1))
    return first, second


def to_zigzag(x: jax.Array, i: jax.Array, n: int, dim: int) -> jax.Array:
    """A device's contiguous part -> its early and its late piece, side by side.

    Args:
      x: The part.
      i: The device's number.
      n: Devices.
      dim: Of the sequence.
    """
    sent = jnp.split(x, 2, axis=dim)
    even, odd = (jax.lax.ppermute(p, AXIS, r) for p, r in zip(sent, _routes(n), strict=True))
    # First pieces have even numbers, so an even device gets its early piece among them.
    is_even = i % 2 == 0
    early, late = jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)
    return jnp.concatenate([early, late], axis=dim)


def from_zigzag(x: jax.Array, i: jax.Array, n: int, dim: int) -> jax.Array:
    """The inverse of `to_zigzag`."""
    early, late = jnp.split(x, 2, axis=dim)
    is_even = i % 2 == 0
    even, odd = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
    back = [[(there, here) for here, there in route] for route in _routes(n)]
    parts = [jax.lax.ppermute(p, AXIS, r) for p, r in zip((even, odd), back, strict=True)]
    return jnp.concatenate(parts, axis=dim)
