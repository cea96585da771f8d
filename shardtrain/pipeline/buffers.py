"""Rows of per-stage buffers `[P, rows + 1, ...]`, and where their dims are sharded.

Every stage reads and writes a row of its own; the last row is the trash that idle stages write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.pipeline.residual import Residual

AXIS = "pipeline"


@dataclass(frozen=True)
class Placement:
    """Sharding constraints of activations.

    Args:
        mesh: the mesh; its axis `pipeline` shards the leading stage dim.
        batch_axes: mesh axes that shard rows of the batch.
        rows: rows of one microbatch; a dim of that size in first place is taken as the batch dim.
    """

    mesh: Any
    batch_axes: tuple[str, ...]
    rows: int

    def _split(self, axes: tuple[str, ...]) -> bool:
        size = 1
        for axis in axes:
            size *= self.mesh.shape[axis]
        return self.rows % size == 0

    def _constrain(self, x: Any, lead: list[Any], axes: tuple[str, ...]) -> Any:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        rest: list[Any] = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(lead))
        if rest and x.shape[len(lead)] == self.rows and self._split(axes):
            rest[0] = axes
        spec = PartitionSpec(*lead, *rest)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def stages(self, xs: Sequence[Any]) -> list[Any]:
        """`[P, rows, ...]` activations of every stage."""
        return [self._constrain(x, [AXIS], self.batch_axes) for x in xs]

    def buffers(self, xs: Sequence[Any]) -> list[Any]:
        """`[P, buffer rows, rows, ...]`."""
        return [self._constrain(x, [AXIS, None], self.batch_axes) for x in xs]

    def residuals(self, x: Residual) -> Residual:
        """As `buffers`, and `[P, buffer rows, layers, rows, ...]`."""
        layers = [self._constrain(a, [AXIS, None, None], self.batch_axes) for a in x.layers]
        return Residual(self.buffers(x.once), layers)

    def microbatch(self, xs: Sequence[Any]) -> list[Any]:
        """`[rows, ...]` of one microbatch, the same on every stage."""
        return [self._constrain(x, [], self.batch_axes) for x in xs]

    def spread(self, xs: Sequence[Any]) -> list[Any]:
        """`[rows, ...]` with rows also over the stages, so that all of them share the head's work.

        Where the rows do not divide, only the batch axes shard them and every stage repeats it.
        """
        axes = (*self.batch_axes, AXIS)
        return [self._constrain(x, [], axes if self._split(axes) else self.batch_axes) for x in xs]

    def numbered(self, xs: Sequence[Any]) -> list[Any]:
        """`[M, rows, ...]`: all microbatches."""
        return [self._constrain(x, [None], self.batch_axes) for x in xs]


def take(buffers: Sequence[Any], rows: jax.Array) -> list[Any]:
    """Row `rows[p]` of every stage `p`: `[P, R, ...] -> [P, ...]`."""
    pick = lambda b, r: jax.lax.dynamic_index_in_dim(b, r, 0, keepdims=False)
    if buffers and buffers[0].shape[1] == 1:
        return [b[:, 0] for b in buffers]
    return [jax.vmap(pick, spmd_axis_name=AXIS)(b, rows) for b in buffers]


def put(buffers: Sequence[Any], values: Sequence[Any], rows: jax.Array) -> list[Any]:
    """Write `values[p]` to row `rows[p]` of every stage `p`."""
    write = lambda b, x, r: jax.lax.dynamic_update_index_in_dim(b, x, r, 0)
    if buffers and buffers[0].shape[1] == 1:
        return [x[:, None] for x in values]
    return [
        jax.vmap(write, spmd_axis_name=AXIS)(b, x.astype(b.dtype), rows)
        for b, x in zip(buffers, values, strict=True)
    ]


def where(active: jax.Array, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """`new` on active stages, `old` elsewhere; never a product: idle stages hold garbage."""

    def one(n: Any, o: Any) -> Any:
        return jnp.where(active.reshape(active.shape + (1,) * (n.ndim - active.ndim)), n, o)

    return [one(n, o) for n, o in zip(new, old, strict=True)]


def zeros_like(values: Sequence[Any]) -> list[Any]:
    """Zeros of the same shapes and dtypes."""
    return [jnp.zeros(x.shape, x.dtype) for x in values]
