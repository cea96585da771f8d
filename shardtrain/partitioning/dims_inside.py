"""The dims of every array inside a traced loss, and the mesh axes that they already have.

The loss is walked once more to give every dim its class; classes get the mesh axes of the
parameters and of the batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.extend.core as jex

from shardtrain.partitioning.infer.dim_graph import DimGraph, Dims
from shardtrain.partitioning.infer.walk import Traced, Walk

Axes = tuple[str, ...]
Entries = tuple[Axes, ...]
Key = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Known:
    """What is laid out already.

    Args:
      sizes: Mesh axis sizes.
      params: Mesh axes per dim, for each parameter leaf in order.
      batch: Mesh axes per dim, for each batch leaf in order.
      num_variables: Leaves between parameters and batch in the loss's arguments.
    """

    sizes: Mapping[str, int]
    params: Sequence[Entries]
    batch: Sequence[Entries]
    num_variables: int


class Seen:
    """A walked program: classes of the dims at every equation, and the mesh axes of classes."""

    def __init__(self, program: jex.ClosedJaxpr, known: Known) -> None:
        self.graph = DimGraph()
        self.sizes = known.sizes
        fresh = self.graph.atoms.fresh
        dims = [[fresh(s) for s in v.aval.shape] for v in program.jaxpr.invars]
        first = len(known.params) + known.num_variables
        last = first + len(known.batch)
        ins = [Traced(d, first <= i < last) for i, d in enumerate(dims)]
        walk = RecordingWalk(self.graph, [d for d in dims[first:last] if d])
        walk.run(program, ins, "<unknown>", 1.0)
        self.equations = walk.equations
        self.of_data = walk.of_data
        self.batch = {r for d in dims[first:last] if d for r in self.roots(d[0])}
        self.axes: dict[int, Axes] = {}
        self.partials: dict[str, set[int]] = {}
        for leaf, entries in zip(dims, known.params, strict=False):
            self._assign(leaf, entries)
        for leaf, entries in zip(dims[first:last], known.batch, strict=True):
            self._assign(leaf, entries)

    def roots(self, dim: Sequence[int]) -> tuple[int, ...]:
        """The classes a dim consists of."""
        return self.graph.atoms.roots(dim)

    def _assign(self, dims: Dims, entries: Entries) -> None:
        """Mesh axes go to the factors of a dim, major to minor."""
        for dim, axes in zip(dims, entries, strict=False):
            left = list(axes)
            for root in self.roots(dim):
                taken: list[str] = []
                size = self.graph.atoms.size[root]
                while left and size % self.sizes[left[0]] == 0:
                    size //= self.sizes[left[0]]
                    taken.append(left.pop(0))
                if taken:
                    self.axes.setdefault(root, tuple(taken))
                if size != 1:
                    break

    def entries(self, dims: Dims) -> Entries:
        """Mesh axes per dim; each mesh axis once."""
        used: set[str] = set()
        found = []
        for dim in dims:
            mine: list[str] = []
            for root in self.roots(dim):
                mine += [a for a in self.axes.get(root, ()) if a not in used]
                used.update(mine)
                if (
                    math.prod(self.sizes[a] for a in self.axes.get(root, ()))
                    != (self.graph.atoms.size[root])
                ):
                    break
            found.append(tuple(mine))
        return tuple(found)

    def key(self, dims: Dims) -> Key:
        """The classes of all dims."""
        return tuple(self.roots(d) for d in dims)

    def is_batch(self, dims: Dims) -> bool:
        """Whether there is one row, or more, per example."""
        return any(r in self.batch for d in dims for r in self.roots(d))

    def is_stream(self, eqn: jex.JaxprEqn, dims: Dims, axis: str) -> bool:
        """A sum over `axis` of `[batch, sequence, ..., width]`, itself not sharded over it."""
        name = eqn.primitive.name
        made = name == "dot_general" or (name == "gather" and not self.reads_data(eqn))
        made = made and len(dims) > 2
        return (
            made
            and self.sums_over(eqn, axis)
            and self.is_batch(dims)
            and not any(axis in e for e in self.entries(dims))
        )

    def reads_data(self, eqn: jex.JaxprEqn) -> bool:
        """Whether the first operand depends on the batch."""
        return id(eqn) in self.of_data

    def split(self, dims: Dims, axis: str) -> Entries | None:
        """Mesh axes with `axis` on the sequence: the first dim that is not the batch, nor the last.

        None where it does not divide.
        """
        whole = self.entries(dims)
        for i, dim in enumerate(dims[:-1]):
            roots = self.roots(dim)
            if not roots or any(r in self.batch for r in roots):
                continue
            size = math.prod(self.graph.atoms.size[r] for r in roots)
            axes = (*whole[i], axis)
            if size % math.prod(self.sizes[a] for a in axes):
                return None
            return (*whole[:i], axes, *whole[i + 1 :])
        return None

    def sums_over(self, eqn: jex.JaxprEqn, axis: str) -> bool:
        """Whether each device along `axis` has only a part of this result's sum."""
        if axis not in self.partials:
            self.partials[axis] = {
                id(p.eqn)
                for p in self.graph.partials
                for term in p.terms
                if any(axis in self.axes.get(r, ()) for r in self.roots(term))
            }
        return id(eqn) in self.partials[axis]


class RecordingWalk(Walk):
    """A walk that remembers the dims at each equation."""

    def __init__(self, graph: DimGraph, inputs: Sequence[Dims]) -> None:
        super().__init__(graph, inputs)
        self.equations: list[tuple[jex.JaxprEqn, list[Dims], list[Dims], str]] = []
        self.of_data: set[int] = set()

    def _equation(self, eqn: Any, args: list[Traced], outer: str, times: float) -> list[Traced]:
        outs = super()._equation(eqn, args, outer, times)
        self.equations.append((eqn, [a.dims for a in args], [o.dims for o in outs], outer))
        if args and args[0].data:
            self.of_data.add(id(eqn))
        return outs
