"""Which arrays inside an unmodified model are constrained, and how: the residual stream.

Design: the traced loss is walked once more to give every dim of every array its class; classes get
the mesh axes that the parameters and the batch already have. Where a contraction or a look-up sums
over a dim that is sharded over `tensor`, its result is the residual stream: there Megatron's
all-reduces are. Constraints never change what is computed, only where.

Sequence parallelism (Korthikanti et al. 2022): the stream is sharded over `tensor` along the
sequence; it is gathered where a column-parallel weight reads it, and scattered where a row-parallel
one adds to it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.partitioning.dims_inside import Entries, Key, Known, Seen
from shardtrain.partitioning.edit import Edit, Edits
from shardtrain.partitioning.infer.dim_graph import Dims
from shardtrain.partitioning.infer.source import source_line

_SUMS = ("add", "add_any", "sub")
_MAKERS = ("dot_general", "gather", *_SUMS)
_ON_OPERANDS = ("gather", "index")


@dataclass(frozen=True)
class Place:
    """One constraint.

    Args:
      kind: "gather" an operand, pin an "index", "scatter" a result, or keep it in the "stream".
      number: Of the operand or result.
      stream: Mesh axes per dim with the sequence sharded over `tensor`.
      whole: The same without.
    """

    kind: str
    number: int
    stream: Entries
    whole: Entries


@dataclass(frozen=True)
class Stream:
    """The constraints of one traced loss.

    Args:
      places: Equation (by identity) -> its constraints.
      indivisible: Shapes whose sequence `tensor` does not divide, with their source.
    """

    places: Mapping[int, tuple[Place, ...]]
    indivisible: tuple[str, ...]

    @property
    def found(self) -> bool:
        """Whether anything is sharded along the sequence."""
        return bool(self.places)


def find_stream(program: jex.ClosedJaxpr, known: Known, axis: str = "tensor") -> Stream:
    """Where the residual stream of a traced loss is, and what touches it.

    Args:
      program: Of `loss(params, variables, batch, key)`.
      known: Layout of its arguments.
      axis: Mesh axis to shard the sequence over.
    """
    seen = Seen(program, known)
    streams: set[Key] = set()
    indivisible: dict[str, None] = {}
    for eqn, _, outs, outer in seen.equations:
        if not outs or not seen.is_stream(eqn, dims := outs[0], axis):
            continue
        if seen.split(dims, axis) is None:
            shape = tuple(math.prod(seen.graph.atoms.size[r] for r in k) for k in seen.key(dims))
            indivisible[f"{shape} ({source_line(eqn, outer)})"] = None
        else:
            streams.add(seen.key(dims))
    places = {}
    for eqn, ins, outs, _ in seen.equations:
        found = (*_results(seen, eqn, ins, outs, streams, axis),)
        if eqn.primitive.name == "dot_general":
            found += (*_operands(seen, ins, streams, axis),)
        if found:
            places[id(eqn)] = found
    return Stream(places, tuple(indivisible))


def find_lookups(program: jex.ClosedJaxpr, known: Known) -> Stream:
    """Look-ups in tables of parameters, pinned to the layout of their indices.

    Left alone, the partitioner of a table that is sharded over two mesh axes moves the rows'
    gradients between devices to meet the table's columns.

    Args:
      program: Of `loss(params, variables, batch, key)`.
      known: Layout of its arguments.
    """
    seen = Seen(program, known)
    places = {}
    for eqn, ins, outs, _ in seen.equations:
        if eqn.primitive.name != "gather" or seen.reads_data(eqn):
            continue
        if seen.is_batch(outs[0]):
            whole = seen.entries(outs[0])
            found = (Place("stream", 0, whole, whole), _index(seen, ins), _table(seen, ins))
            places[id(eqn)] = found
    return Stream(places, ())


def _results(
    seen: Seen,
    eqn: jex.JaxprEqn,
    ins: Sequence[Dims],
    outs: Sequence[Dims],
    streams: set[Key],
    axis: str,
) -> Iterator[Place]:
    name = eqn.primitive.name
    if name not in _MAKERS or seen.key(outs[0]) not in streams:
        return
    if name == "gather" and seen.reads_data(eqn):
        return
    if name in _SUMS and not all(len(d) == len(outs[0]) for d in ins):
        return
    # A table that each device holds whole costs less with dx gathered than with its own gradient
    # summed over `tensor`.
    partial = name not in _SUMS and (name == "gather" or seen.sums_over(eqn, axis))
    yield _place(seen, "scatter" if partial else "stream", 0, outs[0], axis)
    if name == "gather":  # or rows would be looked up where the result is wanted
        yield _index(seen, ins)
        yield _table(seen, ins)


def _operands(seen: Seen, ins: Sequence[Dims], streams: set[Key], axis: str) -> Iterator[Place]:
    """What a column-parallel weight reads."""
    for i in (0, 1):
        weight = ins[1 - i]
        if seen.key(ins[i]) in streams and any(axis in e for e in seen.entries(weight)):
            yield _place(seen, "gather", i, ins[i], axis)


def _place(seen: Seen, kind: str, number: int, dims: Dims, axis: str) -> Place:
    """A constraint with the sequence split, which must divide."""
    stream = seen.split(dims, axis)
    assert stream is not None
    return Place(kind, number, stream, seen.entries(dims))


def _index(seen: Seen, ins: Sequence[Dims]) -> Place:
    entries = seen.entries(ins[1])
    return Place("index", 1, entries, entries)


def _table(seen: Seen, ins: Sequence[Dims]) -> Place:
    """Its gradient is summed before it is split over fsdp."""
    entries = seen.entries(ins[0])
    return Place("gather", 0, entries, entries)


def stream_edits(stream: Stream, constrain: Any) -> Edits:
    """The constraints as edits of the program they were found in.

    Args:
      stream: From `find_stream`.
      constrain: `(array, mesh axes per dim) -> array`.
    """
    changes: dict[tuple[str, Entries], Any] = {}

    def change(place: Place) -> Any:
        key = (place.kind, place.whole)
        if key not in changes:
            changes[key] = _change(place, constrain)
        return changes[key]

    def edit(eqn: jex.JaxprEqn) -> Edit | None:
        places = stream.places.get(id(eqn))
        if not places:
            return None
        return Edit(
            operands={p.number: change(p) for p in places if p.kind in _ON_OPERANDS},
            results={p.number: change(p) for p in places if p.kind not in _ON_OPERANDS},
        )

    return edit


def _change(place: Place, constrain: Any) -> Any:
    """Forward and backward layouts: a plain constraint would transpose onto itself."""
    if place.kind == "index":
        return lambda x: constrain(x, place.whole)
    there, back = {
        "gather": (place.whole, place.stream),
        "scatter": (place.stream, place.whole),
        "stream": (place.stream, place.stream),
    }[place.kind]

    @jax.custom_vjp
    def moved(x: jax.Array) -> jax.Array:
        return constrain(x, there)

    moved.defvjp(lambda x: (constrain(x, there), None), lambda _, g: (constrain(g, back),))
    return moved
