"""A state pytree as a flat `{name: leaf}`, the form in which it lies on disk.

Names are the path of a leaf joined by `/`, the same for dicts, NamedTuples, dataclasses and lists,
so that neither the model's code nor its container classes are needed to read a checkpoint. `/` and
`%` inside a key are percent-encoded, which keeps different paths different.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from shardtrain.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """What a leaf is, before its values are read.

    Attributes:
        shape: as the user sees it (of a PRNG key array: without the words of each key).
        dtype: numpy or ml_dtypes name, or `key<...>` for a typed PRNG key.
        impl: the PRNG implementation of a typed key, else None.
    """

    shape: tuple[int, ...]
    dtype: str
    impl: str | None = None

    @property
    def is_key(self) -> bool:
        """Whether this is a typed PRNG key array."""
        return self.dtype.startswith("key<")

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.size * (8 if self.is_key else jax.numpy.dtype(self.dtype).itemsize)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Flatten `tree` to `{name: leaf}` in tree order.

    Raises:
        CheckpointError: two leaves have one name, or a name would be empty.

    Example:
        >>> named_leaves({"params": {"a.b": 1, "c/d": 2}})
        {'params/a.b': 1, 'params/c%2Fd': 2}
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_component(entry) for entry in path)
        if not name or name.startswith("/") or name.endswith("/") or "//" in name:
            raise CheckpointError(
                f"the leaf at {jax.tree_util.keystr(path) or '(the root)'} has an empty key in its "
                "path; checkpoints need a name for every leaf."
            )
        if name in named:
            raise CheckpointError(
                f"two leaves are both called {name!r} (second at {jax.tree_util.keystr(path)}). "
                "One would overwrite the other: rename one of the keys."
            )
        named[name] = leaf
    return named


def _component(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            text = str(getattr(entry, attribute))
            return text.replace("%", "%25").replace("/", "%2F")
    raise CheckpointError(f"cannot name the tree path entry {entry!r}.")


def unescape(component: str) -> str:
    """A path component of a name as the user wrote it."""
    return component.replace("%2F", "/").replace("%25", "%")


def storage_key(name: str) -> str:
    """The array's key on disk: dots are encoded too, for Orbax joins nested names with them."""
    return name.replace(".", "%2E")


def describe(named: Mapping[str, Any]) -> dict[str, LeafInfo]:
    """Shape, dtype and key kind of every leaf, concrete or abstract.

    Raises:
        CheckpointError: a leaf is no number or array (a string, a function); names it.
    """
    return {name: _info(name, leaf) for name, leaf in named.items()}


def _info(name: str, leaf: Any) -> LeafInfo:
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
        return LeafInfo(tuple(leaf.shape), str(dtype), impl)
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return LeafInfo(tuple(leaf.shape), str(np.dtype(leaf.dtype)))
    array = np.asarray(leaf)
    if not (array.dtype == np.bool_ or jax.dtypes.issubdtype(array.dtype, np.number)):
        raise CheckpointError(
            f"leaf {name}: a {type(leaf).__name__} cannot be checkpointed, only numbers and "
            "arrays. Keep it out of the state, or pass it in `extra` if it is JSON."
        )
    return LeafInfo(array.shape, str(array.dtype))


def on_mesh_of(array: Any) -> contextlib.AbstractContextManager[Any]:
    """Compute on the mesh of `array`, also when the caller has set another one."""
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


def key_words(keys: jax.Array) -> jax.Array:
    """The raw uint32 words of typed keys, `[..., words]`, sharded like the keys."""
    with on_mesh_of(keys):
        return jax.random.key_data(keys)


def to_arrays(named: Mapping[str, Any]) -> dict[str, Any]:
    """Plain arrays under storage keys: keys become their words; zero-size leaves are left out."""
    arrays = {}
    for name, leaf in named.items():
        info = _info(name, leaf)
        if info.size:
            plain = key_words(leaf) if info.is_key else leaf
            arrays[storage_key(name)] = plain if isinstance(plain, jax.Array) else np.asarray(plain)
    return arrays


def to_targets(named: Mapping[str, Any], infos: Mapping[str, LeafInfo]) -> dict[str, Any]:
    """What to ask the store for, so that each leaf arrives where the abstract leaf says.

    Args:
        named: abstract leaves (`jax.ShapeDtypeStruct` with a sharding), or host numbers.
        infos: of the checkpoint, already compared with `named`.
    """
    targets = {}
    for name, leaf in named.items():
        if infos[name].size:
            targets[storage_key(name)] = _target(name, leaf)
    return targets


def _target(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return np.empty(np.shape(leaf), np.asarray(leaf).dtype)
    if leaf.sharding is None:
        raise CheckpointError(
            f"leaf {name} of plan.abstract_state has no sharding: it is not known where to put it."
        )
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def from_arrays(
    arrays: Mapping[str, Any], named: Mapping[str, Any], infos: Mapping[str, LeafInfo]
) -> list[Any]:
    """Leaves in the order of `named`, from what the store returned."""
    return [_leaf(arrays, name, leaf, infos[name]) for name, leaf in named.items()]


def _leaf(arrays: Mapping[str, Any], name: str, leaf: Any, info: LeafInfo) -> Any:
    if not info.size:
        return _empty(leaf, info)
    value = arrays[storage_key(name)]
    if info.is_key:
        with on_mesh_of(value):
            return jax.random.wrap_key_data(value, impl=info.impl)
    if isinstance(leaf, (bool, int, float, complex, np.generic)):
        return type(leaf)(value[()])
    return value


def _empty(leaf: Any, info: LeafInfo) -> Any:
    if info.is_key:
        return jax.random.split(jax.random.key(0, impl=info.impl), info.shape)
    values = np.zeros(info.shape, jax.numpy.dtype(info.dtype))
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return jax.make_array_from_callback(info.shape, leaf.sharding, lambda index: values[index])
    return values
