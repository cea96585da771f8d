"""Who owns which part of every parameter, and the push of gradients to the owners."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.sync.codecs import Codec
from shardtrain.sync.replicas import AXIS, Replicas
from shardtrain.sync.sums import pad_to, push_coded


@dataclass(frozen=True)
class Owners:
    """Which dim of each parameter is divided among the replicas.

    Args:
      replicas: The replicas.
      dims: Per leaf, in tree order: the dim, or None where no dim divides (every replica owns all
        of it).
      specs: Params-shaped tree: sharding of what the owners hold.
    """

    replicas: Replicas
    dims: tuple[int | None, ...]
    specs: Any


def find_owners(params: Any, replicas: Replicas) -> Owners:
    """Divide the largest dim that divides, of every parameter.

    Args:
      params: Abstract parameters.
      replicas: The replicas and how one version is sharded inside each.
    """
    leaves, structure = jax.tree.flatten(params)
    dims, specs = [], []
    for x, spec in zip(leaves, jax.tree.leaves(replicas.specs), strict=True):
        shard = replicas.shard_shape(tuple(x.shape), spec)
        fits = [d for d, n in enumerate(shard) if n % replicas.count == 0 and n]
        dim = max(fits, key=lambda d: shard[d], default=None)
        entries = [*spec, *[None] * (len(shard) - len(spec))]
        if dim is not None:
            old = entries[dim]
            names = () if old is None else (old,) if isinstance(old, str) else tuple(old)
            entries[dim] = (*names, AXIS)
        dims.append(dim)
        specs.append(PartitionSpec(*entries))
    return Owners(replicas, tuple(dims), structure.unflatten(specs))


def make_push(owners: Owners, codec: Codec | None) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`(tree[R, ...], errors[R, ...] or None) -> (sums at their owners, errors)`.

    Args:
      owners: Who owns what.
      codec: How numbers are sent; None: float32.
    """
    replicas = owners.replicas

    def push(tree: Any, errors: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(tree)
        left = jax.tree.leaves(errors)
        outer = jax.tree.leaves(replicas.stacked())
        body = lambda xs, left: _on_device(owners, codec, xs, left)
        sums, left = replicas.on_devices(
            body,
            (outer, outer if left else []),
            (jax.tree.leaves(owners.specs), outer if left else []),
        )(leaves, left)
        return structure.unflatten(sums), structure.unflatten(left) if left else None

    return push


def _on_device(owners: Owners, codec: Codec | None, xs: Any, errors: Any) -> Any:
    count = owners.replicas.count
    mine = [x[0].astype(jnp.float32) for x in xs]
    if errors:
        mine = [x + e[0] for x, e in zip(mine, errors, strict=True)]
    owned = [(x, d) for x, d in zip(mine, owners.dims, strict=True) if d is not None]
    unit = 1 if codec is None else codec.block  # whole blocks for each array, as in `coded_sum`
    parts = [pad_to(_rows(x, d, count), unit) for x, d in owned]
    wide = jnp.concatenate(parts, axis=1) if parts else jnp.zeros((count, 0))
    if codec is None or not parts:
        got = jax.lax.psum_scatter(wide, AXIS, scatter_dimension=0) if parts else wide[0]
        left = jnp.zeros_like(wide)
    else:
        got, left = push_coded(wide, codec)
    sums, kept, start = [], [], 0
    for x, dim in zip(mine, owners.dims, strict=True):
        if dim is None:
            sums.append(jax.lax.psum(x, AXIS))
            kept.append(jnp.zeros_like(x)[None])
            continue
        part = slice(start, start + x.size // count)
        start = part.stop + -(x.size // count) % unit
        sums.append(_unrow(got[None, part], x.shape, dim, 1, count))
        kept.append(_unrow(left[:, part], x.shape, dim, count, count)[None])
    return sums, kept if errors else []


def _rows(x: jax.Array, dim: int, count: int) -> jax.Array:
    """`[R, size / R]`: row `r` is the part of owner `r`."""
    return jnp.moveaxis(x, dim, 0).reshape(count, -1)


def _unrow(rows: jax.Array, shape: tuple[int, ...], dim: int, parts: int, count: int) -> jax.Array:
    """The inverse of `_rows`, for `parts` of the `count` rows."""
    moved = (shape[dim] * parts // count, *shape[:dim], *shape[dim + 1 :])
    return jnp.moveaxis(rows.reshape(moved), 0, dim)
