"""What a user may hand to `DataLoader`, seen as one thing: a length and `example(index)`.

Columns (`{"image": array, "label": array}`) are read with one fancy index per leaf; anything else
only needs `__len__` and `__getitem__` (a list, a memory map, a grain `MapDataset`).
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from shardtrain.errors import DataError


@runtime_checkable
class RandomAccess(Protocol):
    """Anything of known length that is read by index."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """The example at `index`, a pytree of numbers and arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A random-access set of examples.

    `read(indices)` gives one raw example per index; `columns`, when set, is the pytree of arrays
    that allows reading many rows at once.
    """

    length: int
    read: Callable[[Sequence[int]], list[Any]]
    columns: Any = None


def as_source(source: Any) -> Source:
    """View `source` as a `Source`.

    Args:
        source: a mapping of arrays with equal leading dim (columns), or an object with `__len__`
            and `__getitem__`.

    Raises:
        DataError: it is empty, infinite, an iterator, a tuple of arrays, or has unequal columns.

    Example:
        >>> as_source([1, 2, 3]).length
        3
    """
    if isinstance(source, Mapping):
        return _from_columns(source)
    if isinstance(source, tuple) and source and all(np.ndim(leaf) for leaf in source):
        raise DataError(
            f"the source is a tuple of {len(source)} arrays, which could mean columns or examples. "
            "Pass a dict for columns, e.g. {'inputs': x, 'targets': y}, or a list of examples."
        )
    if not isinstance(source, RandomAccess):
        raise DataError(
            f"a {type(source).__name__} cannot be read by index. A data source needs __len__ and "
            "__getitem__ (a list, a dict of arrays, a grain MapDataset); for an iterator, collect "
            "its examples into a list or write them to files first."
        )
    length = len(source)
    _require_examples(length, type(source).__name__)
    if length == sys.maxsize:
        raise DataError(
            "the source is infinite (already repeated). Pass the data set before .repeat(): "
            "DataLoader shuffles and repeats it, with a new order in each epoch."
        )
    return Source(length, lambda indices: [_item(source, index) for index in indices])


def _from_columns(columns: Mapping[Any, Any]) -> Source:
    arrays = jax.tree.map(np.asarray, columns)
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    _require_examples(len(leaves), "dict", "columns")
    lengths = {
        jax.tree_util.keystr(path): leaf.shape[0] if leaf.ndim else None for path, leaf in leaves
    }
    if len(set(lengths.values())) > 1 or None in lengths.values():
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise DataError(
            f"columns must be arrays with the same number of rows, found {listed} "
            "(None marks a scalar)."
        )
    length = leaves[0][1].shape[0]
    _require_examples(length, "dict of arrays")

    def read(indices: Sequence[int]) -> list[Any]:
        return [jax.tree.map(lambda column: column[index], arrays) for index in indices]

    return Source(length, read, arrays)


def _item(source: RandomAccess, index: int) -> Any:
    try:
        return source[index]
    except (IndexError, KeyError) as error:
        raise DataError(
            f"source[{index}] raised {type(error).__name__} although len(source) is {len(source)}. "
            "A source must answer every index from 0 to len - 1."
        ) from error


def _require_examples(length: int, kind: str, noun: str = "examples") -> None:
    if length == 0:
        raise DataError(f"the data source is empty: the {kind} holds no {noun}.")
