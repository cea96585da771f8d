"""Parts of files seen as one array: slices of it are read and written, nothing else."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardtrain.errors import CheckpointError
from shardtrain.pipeline.stages import StageLayout

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Pieces:
    """An array whose leading dims count parts (layers) and whose other dims are those of a part.

    Args:
      parts: Views of mapped files, all of one shape and dtype.
      order: Which part is where; a scalar 0 for a single part that is the whole array.
    """

    parts: tuple[np.ndarray, ...]
    order: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (*self.order.shape, *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """In the file."""
        return self.parts[0].dtype

    def read(self, index: Index, dtype: Any) -> np.ndarray:
        """A slice of the whole, converted; only this slice is read."""
        chosen, inner = self._chosen(index)
        values = [self.parts[n][inner] for n in chosen.flat]
        out = np.empty((len(values), *values[0].shape), dtype)
        for target, value in zip(out, values, strict=True):
            target[...] = value
        return out.reshape(*chosen.shape, *values[0].shape)

    def write(self, index: Index, value: np.ndarray) -> None:
        """Put a slice in its place in the files, converted to their dtype."""
        chosen, inner = self._chosen(index)
        each = value.reshape(chosen.size, *value.shape[chosen.ndim :])
        for n, part in zip(chosen.flat, each, strict=True):
            self.parts[n][inner] = part

    def _chosen(self, index: Index) -> tuple[np.ndarray, Index]:
        layers = self.order.ndim
        return np.asarray(self.order[index[:layers]]), index[layers:]


def single(view: np.ndarray) -> Pieces:
    """One view as the whole array."""
    return Pieces((view,), np.array(0))


def stacked(pieces: Sequence[Pieces]) -> Pieces:
    """Several arrays of one shape along a new first dim."""
    offsets = np.cumsum([0, *(len(p.parts) for p in pieces[:-1])])
    order = np.stack([p.order + n for p, n in zip(pieces, offsets, strict=True)])
    return Pieces(tuple(part for p in pieces for part in p.parts), order)


def stage_major(found: Mapping[str, Pieces], layout: StageLayout) -> dict[str, Pieces]:
    """Arrays by path in the model's own layout -> by path in a pipeline's.

    Args:
      found: Path -> array; paths that the layout does not have are left out.
      layout: Which layers are stacked.
    """
    stages = (layout.virtual_stages, layout.num_stages, layout.per_chunk)
    grid = np.arange(layout.count).reshape(stages).swapaxes(0, 1)
    out = {}
    taken = {p for leaf in layout.leaves for p in leaf.paths}
    for leaf in layout.leaves:
        if leaf.paths[0] in found:
            layers = [found[p] for p in leaf.paths]
            whole = _by_layer(layers[0]) if leaf.stacked else stacked(layers)
            out[f"blocks/{leaf.name}"] = Pieces(whole.parts, whole.order[grid])
    return out | {f"outer/{p}": x for p, x in found.items() if p not in taken and p in layout.paths}


def _by_layer(pieces: Pieces) -> Pieces:
    if pieces.order.ndim:
        return pieces
    (view,) = pieces.parts
    return Pieces(tuple(view), np.arange(len(view)))


def reshaped(view: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    """The same numbers with dims split or merged; a view.

    Args:
      view: View of a file.
      shape: Wanted.
      what: For the error.

    Raises:
      CheckpointError: That would mix dims up, or need a copy.
    """
    if not splits_or_merges(view.shape, shape):
        raise CheckpointError(f"{what}: {list(view.shape)} does not become {list(shape)}")
    out = view.reshape(shape)
    if view.size and not np.may_share_memory(out, view):
        raise CheckpointError(f"{what}: {list(view.shape)} becomes {list(shape)} only by a copy")
    return out


def splits_or_merges(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether every dim is kept, cut into several, or one of several that become one.

    Example:
      >>> splits_or_merges((8, 12), (8, 3, 4)), splits_or_merges((8, 12), (12, 8))
      (True, False)
    """
    if math.prod(before) != math.prod(after):
        return False
    a, b = [[n for n in dims if n != 1] for dims in (before, after)]
    i = j = 0
    while i < len(a):
        left, right, many = a[i], b[j], [1, 1]
        while left != right:
            if left < right:
                i, many[0] = i + 1, many[0] + 1
                left *= a[i]
            else:
                j, many[1] = j + 1, many[1] + 1
                right *= b[j]
        if min(many) > 1:
            return False
        i, j = i + 1, j + 1
    return True
