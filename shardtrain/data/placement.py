"""From rows in host memory to global `jax.Array`s, of which a process reads only its own rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import DataError


def spread(sharding: Any, batch: Any) -> Any:
    """One sharding per leaf of the abstract `batch`; a single one is used for all leaves.

    Raises:
        DataError: the tree of shardings differs from the batch's, or a dim does not divide.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: sharding, batch)
    else:
        shardings = sharding
        if jax.tree.structure(shardings) != jax.tree.structure(batch):
            raise DataError(
                f"the shardings have the structure {jax.tree.structure(shardings)}, the batch has "
                f"{jax.tree.structure(batch)}. Pass one NamedSharding, or one per leaf."
            )
    jax.tree_util.tree_map_with_path(_require_divisible, batch, shardings)
    return shardings


def _require_divisible(path: Any, leaf: jax.ShapeDtypeStruct, sharding: Any) -> None:
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = getattr(sharding, "spec", sharding)
        raise DataError(
            f"batch leaf {name or '(itself)'} {list(leaf.shape)} cannot be sharded as {spec}: "
            f"{error}"
        ) from error


def addressable_rows(shardings: Any, batch: Any) -> np.ndarray:
    """Sorted rows (indices of the leading dim, int64) that this process's devices need."""
    leaves = zip(jax.tree.leaves(batch), jax.tree.leaves(shardings), strict=True)
    blocks = {
        index[0].indices(leaf.shape[0])
        for leaf, sharding in leaves
        for index in sharding.addressable_devices_indices_map(leaf.shape).values()
    }
    return np.unique(np.concatenate([np.arange(*block) for block in sorted(blocks)]))


def place(local: Any, rows: np.ndarray, shardings: Any, batch: Any) -> Any:
    """Global arrays from this process's rows.

    Args:
        local: pytree of numpy arrays `[len(rows), ...]`.
        rows: the sorted global row of each local row.
        shardings: one per leaf.
        batch: abstract global batch (shapes and dtypes).
    """

    def one(leaf: np.ndarray, want: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(
            want.shape, sharding, _reader(leaf, rows, want.shape[0]), dtype=want.dtype
        )

    return jax.tree.map(one, local, batch, shardings)


def _reader(leaf: np.ndarray, rows: np.ndarray, length: int) -> Callable[[Any], np.ndarray]:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(length)
        first, last = np.searchsorted(rows, (start, stop))
        return leaf[(slice(first, last), *index[1:])]

    return read


def row_sharding(shardings: Any) -> NamedSharding:
    """The sharding of a `[rows]` vector that lies beside the batch (a mask of rows)."""
    first = jax.tree.leaves(shardings)[0]
    return NamedSharding(first.mesh, PartitionSpec(*first.spec[:1]))
