"""Paths and sizes of pytree leaves: one spelling for the whole library."""

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def path_string(path: tuple[Any, ...]) -> str:
    """`('decoder', 'layers', 0, 'kernel')` key path -> `"decoder/layers/0/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in tree order."""
    return {path_string(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn(path, leaf, *rest_leaves)` over a tree; the path is a string."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *others: fn(path_string(path), leaf, *others), tree, *rest
    )


def nested(flat: Mapping[str, Any], name: Callable[[str], Any] = str) -> dict[str, Any]:
    """The inverse of `leaves_by_path` for nested dicts.

    Args:
      flat: Path -> leaf.
      name: From a part of a path to a key.

    Example:
      >>> nested({"a/b": 1, "a/c": 2})
      {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = map(name, path.split("/"))
        inside = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[last] = leaf
    return tree


def nbytes(leaf: Any) -> int:
    """Bytes of one array, abstract array or typed key."""
    dtype = leaf.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return math.prod(leaf.shape) * 8
    return math.prod(leaf.shape) * np.dtype(dtype).itemsize


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(nbytes(leaf) for leaf in jax.tree.leaves(tree))


def abstract(tree: Any) -> Any:
    """Every leaf as a `jax.ShapeDtypeStruct`; allocates nothing."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype_of(x)), tree)


def abstract_key() -> Any:
    """`jax.random.key(0)` as a shape; making the key itself would start a backend."""
    return jax.eval_shape(lambda: jax.random.key(0))


def dtype_of(leaf: Any) -> Any:
    """The dtype JAX would give this leaf (Python numbers and 64-bit arrays included)."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    return jax.dtypes.canonicalize_dtype(dtype if dtype is not None else np.asarray(leaf).dtype)


def matches(path: str, glob: str) -> bool:
    """Whether a parameter path matches a glob: `*` within a name, `**` across names.

    Example:
      >>> matches("layers/0/mlp/up/kernel", "layers/*/mlp/**")
      True
      >>> matches("layers/0/mlp/up/kernel", "*/kernel")
      False
    """
    return re.fullmatch(_regex(glob), path) is not None


def _regex(glob: str) -> str:
    parts = []
    for name in glob.split("/"):
        if name == "**":
            parts.append("**")
        else:
            body = fnmatch.translate(name).removeprefix("(?s:").removesuffix(r")\Z")
            body = body.removesuffix(r")\z")
            parts.append(body.replace(".*", "[^/]*"))
    text = "/".join(parts)
    text = text.replace("**/", "(?:[^/]+/)*").replace("/**", "(?:/[^/]+)*").replace("**", ".*")
    return text
