"""Rows of the global sequence: order → source → transform → stacked batch."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from shardtrain.data import collate
from shardtrain.data.order import Order, example_rng
from shardtrain.data.source import Source
from shardtrain.errors import DataError


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads any rows of any step; immutable, so a thread may share it."""

    source: Source
    order: Order
    transform: Callable[..., Any] | None
    takes_rng: bool
    spec: collate.ExampleSpec

    def batch(self, global_batch_size: int, rows: np.ndarray, step: int) -> Any:
        """The given rows of the global batch of `step`."""
        positions = step * global_batch_size + rows
        return self.stacked(self.order.indices(positions), positions)

    def stacked(self, indices: np.ndarray, positions: np.ndarray) -> Any:
        """The examples at `indices`, transformed as those at `positions` of the sequence."""
        columns = self.source.columns
        if columns is None or self.transform is not None:
            return collate.stack(self._examples(indices, positions), indices, self.spec)
        spec = self.spec
        leaves = [
            collate.cast(column[indices], want, name)
            for column, want, name in zip(
                jax.tree.leaves(columns), spec.leaves, spec.names, strict=True
            )
        ]
        return jax.tree.unflatten(spec.treedef, leaves)

    def _examples(self, indices: np.ndarray, positions: np.ndarray) -> list[Any]:
        raw = self.source.read(indices.tolist())
        if self.transform is None:
            return raw
        seed = self.order.seed if self.takes_rng else None
        rows = zip(raw, indices.tolist(), positions.tolist(), strict=True)
        return [apply(self.transform, *row, seed=seed) for row in rows]


def make_reader(source: Source, order: Order, transform: Callable[..., Any] | None) -> Reader:
    """A `Reader` whose examples must all look like example 0, which is read here."""
    takes_rng = transform is not None and _takes_rng(transform)
    [first] = source.read([0])
    if transform is not None:
        first = apply(transform, first, 0, 0, seed=order.seed if takes_rng else None)
    return Reader(source, order, transform, takes_rng, collate.spec_of(first, 0))


def apply(
    transform: Callable[..., Any], example: Any, index: int, position: int, seed: int | None
) -> Any:
    """`transform(example[, rng])`, with the example named in whatever goes wrong."""
    rng = () if seed is None else (example_rng(seed, position),)
    try:
        return transform(example, *rng)
    except Exception as error:  # whatever the user's code raises, the index must be named
        raise DataError(
            f"transform failed on example {index} (position {position} of the sequence): "
            f"{type(error).__name__}: {error}"
        ) from error


def _takes_rng(transform: Callable[..., Any]) -> bool:
    """Whether `transform` has a second required positional parameter, or one called `rng`."""
    try:
        parameters = list(inspect.signature(transform).parameters.values())
    except ValueError:  # some built-ins have no signature; they take the example only
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (
        positional[1].default is positional[1].empty or positional[1].name == "rng"
    )
