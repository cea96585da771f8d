"""Batches: checked against the plan, then placed on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import BatchError
from shardtrain.pytree import dtype_of, path_string


def own(x: Any, sharding: Any) -> jax.Array:
    """A copy of `x` in a sharding, sharing no buffer with it: the step donates its state.

    `jax.device_put(..., may_alias=False)` still shares the buffer of a device that already holds
    the same shard (seen on jax 0.10.2), and donation would then delete the user's array.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(jnp.copy(x), sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return place_key(x, sharding)
    host = np.array(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_key(key: jax.Array, sharding: Any) -> jax.Array:
    """A typed key on a mesh, also one of several processes, where `device_put` refuses keys."""
    data, impl = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
    return jax.jit(
        lambda: jax.random.wrap_key_data(jnp.asarray(data), impl=impl), out_shardings=sharding
    )()


class PlacedCheck:
    """Whether a batch already is what the plan wants: the path of every step but the first.

    Args:
      planned: Batch of abstract arrays with shardings.
    """

    def __init__(self, planned: Any):
        wanted, self._tree = jax.tree.flatten(planned)
        self._wanted = [(x.sharding, x.shape, x.dtype) for x in wanted]

    def __call__(self, batch: Any) -> bool:
        """True if every leaf has the planned sharding, shape and dtype."""
        leaves, tree = jax.tree.flatten(batch)
        if tree != self._tree:
            return False
        for leaf, (sharding, shape, dtype) in zip(leaves, self._wanted, strict=True):
            if not isinstance(leaf, jax.Array) or leaf.shape != shape or leaf.dtype != dtype:
                return False
            if leaf.sharding is not sharding and leaf.sharding != sharding:
                return False
        return True


def check_batch(batch: Any, planned: Any) -> None:
    """Every leaf has the planned shape and dtype.

    Raises:
      BatchError: Names each leaf that changed, with both shapes and what to do.
    """
    leaves, tree = jax.tree.flatten(batch)
    wanted, wanted_tree = jax.tree.flatten(planned)
    if tree != wanted_tree:
        raise BatchError(_structure(batch, planned))
    for leaf, want in zip(leaves, wanted, strict=True):
        if np.shape(leaf) != want.shape or dtype_of(leaf) != want.dtype:
            raise BatchError(_differences(batch, planned))


def place_tree(batch: Any, planned: Any) -> Any:
    """Arrays of global shape -> global arrays in the planned shardings.

    Arrays already placed are passed on; on several processes each reads only its own rows.
    """
    return jax.tree.map(_place, batch, planned)


def _place(leaf: Any, want: jax.ShapeDtypeStruct) -> jax.Array:
    sharding: Any = want.sharding
    if isinstance(leaf, jax.Array):
        if leaf.sharding == sharding or leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if leaf.is_fully_addressable and sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if not leaf.is_fully_addressable:
            raise BatchError(
                f"a batch leaf {leaf.shape} spans processes with sharding {leaf.sharding}, the "
                f"plan wants {sharding}. Pass NumPy arrays of global shape, or use st.DataLoader"
            )
    host = np.asarray(leaf, want.dtype)
    if sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _structure(batch: Any, planned: Any) -> str:
    found = {path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(batch)}
    wanted = {path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(planned)}
    parts = []
    if wanted - found:
        parts.append(f"missing {sorted(wanted - found)}")
    if found - wanted:
        parts.append(f"unexpected {sorted(found - wanted)}")
    said = " and ".join(parts) or f"containers {jax.tree.structure(batch)}"
    return f"the batch has another structure than the plan's example batch: {said}"


def _differences(batch: Any, planned: Any) -> str:
    lines = []
    flat = jax.tree_util.tree_leaves_with_path(batch)
    for (path, leaf), want in zip(flat, jax.tree.leaves(planned), strict=True):
        shape, dtype = np.shape(leaf), dtype_of(leaf)
        name = path_string(path) or "batch"
        if shape != want.shape:
            lines.append(f"  {name}: shape {want.shape} planned, {shape} given{_hint(want, shape)}")
        elif dtype != want.dtype:
            lines.append(
                f"  {name}: dtype {want.dtype} planned, {dtype} given: cast it where it is made, "
                f"x.astype({str(want.dtype)!r})"
            )
    return "the batch changed, and a new shape would compile the step again:\n" + "\n".join(lines)


def _hint(want: Any, shape: tuple[int, ...]) -> str:
    if len(shape) == len(want.shape) and shape[1:] == want.shape[1:]:
        if shape[0] < want.shape[0]:
            return (
                f": pad {want.shape[0] - shape[0]} rows with mask 0, or drop the last batch "
                "(st.DataLoader does neither: its batches are always full)"
            )
        return f": split it into batches of {want.shape[0]} rows, or plan with this batch"
    return ": pad or crop to the planned shape, or make another plan with this batch"
