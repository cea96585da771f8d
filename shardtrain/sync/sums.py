"""Sums over replicas, as each device computes them: one function per way to send numbers.

All run inside `shard_map`. They take this device's shards as a list of float32 arrays and return
their sums over the replicas, and what rounding left out. Left-out numbers are in the same units as
the sums: added to what is sent next time, nothing is lost (error feedback).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from shardtrain.sync.codecs import Codec
from shardtrain.sync.replicas import AXIS

Arrays = Sequence[jax.Array]


def dense_sum(xs: Arrays, count: int, hosts: int) -> list[jax.Array]:
    """Reduce-scatter, then all-gather, in float32.

    With several hosts: reduce-scatter within each, all-reduce of the parts between them, all-gather
    within each. Then only `1 / replicas per host` of the numbers crosses the slow network.

    Args:
      xs: This device's shards.
      count: Replicas, R.
      hosts: Groups of consecutive replicas; divides R.
    """
    inner = count // hosts
    near = [[h * inner + i for i in range(inner)] for h in range(hosts)] if hosts > 1 else None
    far = [[h * inner + i for h in range(hosts)] for i in range(inner)]
    flat, size = _padded(xs, inner)
    part = jax.lax.psum_scatter(flat, AXIS, axis_index_groups=near, tiled=True)
    if hosts > 1:
        part = jax.lax.psum(part, AXIS, axis_index_groups=far)
    whole = jax.lax.all_gather(part, AXIS, axis_index_groups=near, tiled=True)
    return _unflat(whole[:size], xs)


def coded_sum(xs: Arrays, count: int, codec: Codec) -> tuple[list[jax.Array], list[jax.Array]]:
    """All-to-all of coded parts, each owner adds its part and codes it again, all-gather.

    The two-stage scheme of 1-bit Adam (Tang et al. 2021, arXiv:2102.02888). What the owner's second
    rounding leaves out is added to the owner's own remainder: the total is kept.

    Returns:
      The sums, and what this device has not sent.
    """
    # Whole blocks for each array: an array that several devices of a replica hold must be rounded
    # alike on all of them, whatever else each of them sends.
    blocks = [pad_to(x.reshape(-1), codec.block) for x in xs]
    flat, size = _padded(blocks, count * codec.block)
    length = flat.size // count
    mine, left = push_coded(flat.reshape(count, length), codec)
    back = codec.encode(mine[None])
    own = mine - codec.decode(back, length)[0]
    left = left.at[jax.lax.axis_index(AXIS)].add(own)
    whole = codec.decode(jax.lax.all_gather(back[0], AXIS), length)
    cut = lambda wide: [
        b[: x.size].reshape(x.shape)
        for b, x in zip(_unflat(wide.reshape(-1)[:size], blocks), xs, strict=True)
    ]
    return cut(whole), cut(left)


def push_coded(parts: jax.Array, codec: Codec) -> tuple[jax.Array, jax.Array]:
    """A reduce-scatter of coded numbers: row `r` goes to replica `r`, which adds what it gets.

    Args:
      parts: `float32[R, L]`.
      codec: How a row becomes bytes.

    Returns:
      `float32[L]`, the sum of this replica's row, and `float32[R, L]`, what was not sent.
    """
    sent = codec.encode(parts)
    left = parts - codec.decode(sent, parts.shape[1])
    got = jax.lax.all_to_all(sent, AXIS, split_axis=0, concat_axis=0, tiled=True)
    return jnp.sum(codec.decode(got, parts.shape[1]), axis=0), left


def kept(fraction: float, size: int) -> int:
    """How many numbers of an array of `size` top-k sends."""
    return max(1, math.ceil(fraction * size))


def sparse_sum(xs: Arrays, fraction: float) -> tuple[list[jax.Array], list[jax.Array]]:
    """All-gather of the largest numbers of each array and their places.

    Returns:
      The sums, and what this device has not sent.
    """
    flat = [x.reshape(-1) for x in xs]
    places = [jax.lax.top_k(jnp.abs(x), kept(fraction, x.size))[1] for x in flat]
    values = [x[i] for x, i in zip(flat, places, strict=True)]
    bits = jax.lax.bitcast_convert_type(jnp.concatenate(values), jnp.int32)
    got = jax.lax.all_gather(jnp.concatenate([bits, *places]), AXIS)
    all_bits, all_places = jnp.split(got, 2, axis=1)
    all_values = jax.lax.bitcast_convert_type(all_bits, jnp.float32)
    sums, left, start = [], [], 0
    for x, at, shape in zip(flat, places, [x.shape for x in xs], strict=True):
        part = slice(start, start + at.size)
        start += at.size
        total = jnp.zeros_like(x).at[all_places[:, part]].add(all_values[:, part])
        sums.append(total.reshape(shape))
        left.append(x.at[at].set(0.0).reshape(shape))
    return sums, left


def as_matrix(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """Rows and columns of an array for low-rank products; None where it is cheaper sent whole."""
    if len(shape) < 2:
        return None
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return (rows, columns) if rank * (rows + columns) < rows * columns else None


def low_rank_sum(
    xs: Arrays, warm: Arrays, rank: int
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """PowerSGD: one power iteration from the last right factors; two all-reduces.

    Args:
      xs: This device's shards.
      warm: Right factors `[columns, rank]` of those that are factored, in order.
      rank: Columns of the factors.

    Returns:
      The sums, what this device has not sent, and the new right factors.
    """
    shapes = [as_matrix(x.shape, rank) for x in xs]
    matrices = [x.reshape(s) for x, s in zip(xs, shapes, strict=True) if s is not None]
    whole = [x for x, s in zip(xs, shapes, strict=True) if s is None]
    lefts = [m @ q for m, q in zip(matrices, warm, strict=True)]
    summed = _sum_together([*lefts, *whole])
    lefts = [jnp.linalg.qr(p)[0] for p in summed[: len(lefts)]]
    whole = summed[len(lefts) :]
    mine = [m.T @ p for m, p in zip(matrices, lefts, strict=True)]
    rights = _sum_together(mine)
    sums, left, low, plain = [], [], iter(zip(lefts, mine, rights, strict=True)), iter(whole)
    for x, shape in zip(xs, shapes, strict=True):
        if shape is None:
            sums.append(next(plain))
            left.append(jnp.zeros_like(x))
        else:
            p, own, q = next(low)
            sums.append((p @ q.T).reshape(x.shape))
            left.append(x - (p @ own.T).reshape(x.shape))
    return sums, left, rights


def _sum_together(xs: list[jax.Array]) -> list[jax.Array]:
    """One all-reduce for several arrays."""
    if not xs:
        return []
    flat, size = _padded(xs, 1)
    return _unflat(jax.lax.psum(flat, AXIS)[:size], xs)


def pad_to(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros behind the last dim up to a multiple."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def _padded(xs: Arrays, multiple: int) -> tuple[jax.Array, int]:
    """All numbers in one row, zeros up to a multiple, and how many there are."""
    flat = jnp.concatenate([x.reshape(-1) for x in xs])
    return pad_to(flat, multiple), flat.size


def _unflat(flat: jax.Array, like: Arrays) -> list[jax.Array]:
    found, start = [], 0
    for x in like:
        found.append(flat[start : start + x.size].reshape(x.shape))
        start += x.size
    return found
