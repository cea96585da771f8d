"""`DataLoader`: global batch = f(seed, step).

Design: the loader has no position to save or lose. Any process, at any time, on any mesh, can ask
for any step and gets the same global batch, of which it reads only its own rows. That makes exact
resume, restarts on another number of processes and prefetching all the same trivial thing.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from shardtrain.data import placement
from shardtrain.data.order import Order
from shardtrain.data.prefetch import Prefetcher
from shardtrain.data.reader import make_reader
from shardtrain.data.source import as_source
from shardtrain.errors import DataError

_FINGERPRINT_EXAMPLES = 8


class DataLoader:
    """Global batches of a data set, addressed by step.

    Examples are shuffled anew in every epoch (grain's O(1) permutation) and the sequence of epochs
    is cut into batches without dropping a remainder: position `step * global_batch_size + row`.

    Args:
        source: a dict of arrays (columns), or anything with `__len__` and `__getitem__` whose
            examples are pytrees of numbers and arrays of one shape.
        global_batch_size: rows per step over all processes and microbatches.
        seed: of the order, the weighted draws and the transform.
        weights: sampling weight of each example, `[len(source)]`; drawn with replacement.
        transform: `transform(example)` or `transform(example, rng)`; `rng` is a numpy `Generator`
            that depends on (seed, position) only, so augmentation is the same on any layout.
        shuffle: False reads the source in order.
        prefetch: batches read, and placed on the devices, ahead by a thread under sequential
            access; 0 for none.
        allow_repeats: accept a batch larger than the source (rows then repeat within a batch).

    Raises:
        DataError: nothing to read, bad weights, or examples that cannot be stacked.

    Example:
        >>> loader = DataLoader({"x": np.arange(10)}, global_batch_size=4, seed=1)
        >>> loader.batch(0)["x"].shape, loader.epoch(3)
        ((4,), 1)
    """

    def __init__(
        self,
        source: Any,
        global_batch_size: int,
        seed: int = 0,
        weights: Any = None,
        transform: Callable[..., Any] | None = None,
        *,
        shuffle: bool = True,
        prefetch: int = 2,
        allow_repeats: bool = False,
    ):
        self._source = as_source(source)
        _check_batch_size(global_batch_size, self._source.length, weights, allow_repeats)
        self.global_batch_size = int(global_batch_size)
        self.seed = seed
        order = Order(self._source.length, seed, weights, shuffle)
        self._reader = make_reader(self._source, order, transform)
        self._prefetch = prefetch
        self._ahead: tuple[Any, Prefetcher[Any] | _Direct] | None = None
        self._fingerprint: str | None = None

    @property
    def examples_per_epoch(self) -> int:
        """Number of examples in the source."""
        return self._source.length

    @property
    def abstract_batch(self) -> Any:
        """The global batch as a pytree of `jax.ShapeDtypeStruct`."""

        def add_rows(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.global_batch_size, *leaf.shape), leaf.dtype)

        return jax.tree.map(add_rows, self._reader.spec.abstract)

    def epoch(self, step: int) -> int:
        """The epoch that the first row of `step` belongs to, counted from 0."""
        return step * self.global_batch_size // self.examples_per_epoch

    def batch(self, step: int, sharding: Any = None) -> Any:
        """The global batch of `step`.

        Args:
            step: 0, 1, 2, ...
            sharding: one `NamedSharding`, or one per leaf. Global `jax.Array`s come back and only
                the rows of this process's devices are read. None gives all rows in numpy.

        Returns:
            A pytree with a leading dim of `global_batch_size` in every leaf.

        Raises:
            DataError: an example cannot be read, transformed or stacked, or a dim does not divide.
        """
        if step < 0:
            raise DataError(f"step must not be negative, got {step}.")
        key = jax.tree.flatten(sharding)
        if self._ahead is None or self._ahead[0] != key:
            self.close()
            self._ahead = (key, self._reading(sharding))
        return self._ahead[1].get(step)

    def rows(self, step: int, rows: np.ndarray) -> Any:
        """Some rows of the global batch of `step`, in numpy: the very values `batch` would deliver.

        Args:
            step: 0, 1, 2, ...
            rows: int64 `[n]`, each below `global_batch_size`.
        """
        return self._reader.batch(self.global_batch_size, rows, step)

    def local_rows(self, sharding: Any) -> np.ndarray:
        """The rows of each global batch, int64 and sorted, that this process would read."""
        shardings = placement.spread(sharding, self.abstract_batch)
        return placement.addressable_rows(shardings, self.abstract_batch)

    def eval_batches(self, sharding: Any = None) -> Iterator[tuple[Any, Any]]:
        """One pass in source order: `(batch, mask)` with every batch of the same static shape.

        The last batch is filled up with copies of example 0 whose `mask` (float32 `[rows]`) is 0:
        multiply it into the weights of the loss and no row is dropped or counted twice. Every
        process yields the same number of batches.
        """
        for start in range(0, self.examples_per_epoch, self.global_batch_size):
            positions = start + np.arange(self.global_batch_size)
            mask = (positions < self.examples_per_epoch).astype(np.float32)
            indices = np.where(mask > 0, positions, 0)
            if sharding is None:
                yield self._reader.stacked(indices, indices), mask
                continue
            abstract = self.abstract_batch
            shardings = placement.spread(sharding, abstract)
            rows = placement.addressable_rows(shardings, abstract)
            local = self._reader.stacked(indices[rows], indices[rows])
            beside = placement.row_sharding(shardings)
            weight = jax.make_array_from_callback(mask.shape, beside, lambda i, m=mask: m[i])
            yield placement.place(local, rows, shardings, abstract), weight

    @property
    def num_eval_batches(self) -> int:
        """How many batches `eval_batches` yields."""
        return -(-self.examples_per_epoch // self.global_batch_size)

    @property
    def eval_summary(self) -> str:
        """For the log: `eval: 1003 examples (21 padding rows ignored)`."""
        padding = self.num_eval_batches * self.global_batch_size - self.examples_per_epoch
        return f"eval: {self.examples_per_epoch} examples ({padding} padding rows ignored)"

    def fingerprint(self) -> str:
        """Identity of the data set: length, structure, dtypes and a hash of a few raw examples."""
        if self._fingerprint is None:
            length = self.examples_per_epoch
            indices = np.unique(np.linspace(0, length - 1, _FINGERPRINT_EXAMPLES).astype(np.int64))
            digest = hashlib.sha256(f"{length}".encode())
            for example in self._source.read(indices.tolist()):
                for path, leaf in jax.tree_util.tree_leaves_with_path(example):
                    array = np.asarray(leaf)
                    header = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
                    digest.update(header.encode())
                    digest.update(str(leaf).encode() if array.dtype.hasobject else array.tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What determines the order of examples; JSON, to be stored beside a checkpoint."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "examples": self.examples_per_epoch,
            "fingerprint": self.fingerprint(),
        }

    def check_resume(self, saved: Mapping[str, Any]) -> None:
        """Refuse to continue a run whose data differ from the `saved` `describe()`.

        Raises:
            DataError: lists each difference: the steps after a resume would see other examples
                than the uninterrupted run.
        """
        now = self.describe()
        changed = [f"{k}: {saved[k]} → {now[k]}" for k in now if k in saved and saved[k] != now[k]]
        if changed:
            raise DataError(
                "the data loader is not the one this run was saved with ("
                + "; ".join(changed)
                + "). "
                "Examples would be repeated or skipped. Restore the former settings, or start a "
                "new run directory."
            )

    def close(self) -> None:
        """Stop reading ahead. The loader stays usable."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def _reading(self, sharding: Any) -> Any:
        """What reads and places the batches: ahead of the caller, or when asked."""
        # bound to the reader, not to self: a cycle would keep a dropped loader's thread alive
        if sharding is None:
            rows = np.arange(self.global_batch_size)
            read = functools.partial(self._reader.batch, self.global_batch_size, rows)
        else:
            batch = self.abstract_batch
            shardings = placement.spread(sharding, batch)
            rows = placement.addressable_rows(shardings, batch)
            read_rows = functools.partial(self._reader.batch, self.global_batch_size, rows)
            place = functools.partial(placement.place, rows=rows, shardings=shardings, batch=batch)
            read = lambda step: place(read_rows(step))
        return Prefetcher(read, self._prefetch) if self._prefetch > 0 else _Direct(read)


class _Direct:
    """Reads when asked: a `Prefetcher` of depth 0."""

    def __init__(self, read: Callable[[int], Any]):
        self.get = read

    def close(self) -> None:
        """Nothing runs."""


def _check_batch_size(size: int, length: int, weights: Any, allow_repeats: bool) -> None:
    if size < 1:
        raise DataError(f"global_batch_size must be at least 1, got {size}.")
    if size > length and weights is None and not allow_repeats:
        raise DataError(
            f"global_batch_size={size} is larger than the source ({length} examples): every batch "
            f"would hold some examples twice. Use at most {length}, or allow_repeats=True if that "
            "is meant."
        )
