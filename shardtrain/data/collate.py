"""Examples → one batch: every example must have the structure, shapes and dtypes of the first."""

import dataclasses
from typing import Any

import jax
import numpy as np

from shardtrain.errors import DataError


@dataclasses.dataclass(frozen=True)
class ExampleSpec:
    """Structure, shapes and dtypes of one example.

    64-bit leaves are delivered in 32 bits, as `jax.numpy` would (all 64 with `jax_enable_x64`);
    integers that do not fit are an error, never a wrap-around.
    """

    treedef: Any
    names: tuple[str, ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def abstract(self) -> Any:
        """The example as a pytree of `jax.ShapeDtypeStruct`."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def spec_of(example: Any, index: int) -> ExampleSpec:
    """The spec of the example at `index`.

    Raises:
        DataError: it has no leaves, or a leaf that is not numeric.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(example)
    if not flat:
        raise DataError(f"example {index} has no arrays in it: {example!r}.")
    names = tuple(_name(path) for path, _ in flat)
    arrays = [_as_array(leaf, name, index) for name, (_, leaf) in zip(names, flat, strict=True)]
    leaves = tuple(
        jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(a.dtype)) for a in arrays
    )
    return ExampleSpec(treedef, names, leaves)


def stack(examples: list[Any], indices: np.ndarray, spec: ExampleSpec) -> Any:
    """Stack examples into a batch pytree with a leading dim of `len(examples)`.

    Args:
        examples: one pytree per row.
        indices: int `[n]`, the source index of each row, for messages.
        spec: what each must look like.

    Raises:
        DataError: an example differs from `spec`; names the index, the leaf, and both shapes.
    """
    columns: list[list[np.ndarray]] = [[] for _ in spec.leaves]
    for example, index in zip(examples, indices, strict=True):
        flat, treedef = jax.tree.flatten(example)
        if treedef != spec.treedef:
            raise DataError(
                f"example {index} has the structure {treedef}, the first one had {spec.treedef}."
            )
        rows = zip(flat, spec.names, spec.leaves, columns, strict=True)
        for leaf, name, want, column in rows:
            column.append(_matching(leaf, name, int(index), want))
    stacked = [
        cast(np.stack(column), want, name)
        for column, want, name in zip(columns, spec.leaves, spec.names, strict=True)
    ]
    return jax.tree.unflatten(spec.treedef, stacked)


def cast(array: np.ndarray, want: jax.ShapeDtypeStruct, name: str) -> np.ndarray:
    """`array` in the delivered dtype; integers must survive exactly."""
    if array.dtype == want.dtype:
        return array
    out = array.astype(want.dtype)
    if np.issubdtype(array.dtype, np.integer) and not np.array_equal(out, array):
        raise DataError(
            f"batch leaf {name}: values from {array.min()} to {array.max()} do not fit in "
            f"{want.dtype}. Rescale them, or set the flag jax_enable_x64."
        )
    return out


def _matching(leaf: Any, name: str, index: int, want: jax.ShapeDtypeStruct) -> np.ndarray:
    array = _as_array(leaf, name, index)
    delivered = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.shape != want.shape or delivered != want.dtype:
        raise DataError(
            f"example {index}, leaf {name}: {delivered}{list(array.shape)}, but the first example "
            f"had {want.dtype}{list(want.shape)}. All examples need one shape and dtype: pad, crop "
            "or cast them in `transform`."
        )
    return array


def _as_array(leaf: Any, name: str, index: int) -> np.ndarray:
    array = np.asarray(leaf)
    numeric = array.dtype == np.bool_ or jax.dtypes.issubdtype(array.dtype, np.number)
    if not numeric:
        raise DataError(
            f"example {index}, leaf {name}: {type(leaf).__name__} {str(leaf)[:40]!r} is not "
            "numeric. Encode it in `transform`, or drop it from the examples."
        )
    return array


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the example itself)"
