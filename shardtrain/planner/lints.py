"""Communication in a compiled step that probably should not be there."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from shardtrain.planner.collectives import UNKNOWN_AXES, Collective
from shardtrain.planner.traffic import axes_text, format_bytes, wire_bytes

MIB = 2**20


@dataclass(frozen=True)
class Lint:
    """One suspicion.

    Attributes:
        kind: `all-reduce-then-slice`, `gather-by-all-reduce`, `repeated-gather`,
            `unexpected-axis`, `unknown-groups` or `unexpected-gather`.
        message: what, where, how much, and what to do.
        bytes: payload per step and device that it concerns; for `repeated-gather` the payload
            that would be saved, for those about an all-reduce the bytes on the wire.
    """

    kind: str
    message: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def _where(collective: Collective) -> str:
    name = collective.parameter or collective.operation_name or "a computed value"
    return f"{name} ({collective.source})" if collective.source else name


def _sliced_reductions(rows: Iterable[Collective]) -> list[Lint]:
    """All-reduces of which each device keeps its own part: a reduce-scatter sends half."""
    return [
        Lint(
            "all-reduce-then-slice",
            f"an all-reduce of {format_bytes(c.bytes)} over {axes_text(c)}, {c.count} per step, is "
            f"only sliced: {_where(c)}. A reduce-scatter sends half. (The CPU compiler never makes "
            "one; on other platforms constrain the gradient to the parameter's sharding.)",
            round(wire_bytes(c) * c.count / 2),
        )
        for c in rows
        if c.kind == "all-reduce" and c.is_only_sliced
    ]


def _summed_gathers(rows: Iterable[Collective]) -> list[Lint]:
    """All-reduces that only put pieces together: an all-gather sends half."""
    return [
        Lint(
            "gather-by-all-reduce",
            f"{_where(c)} is gathered by an all-reduce of {format_bytes(c.bytes)} over "
            f"{axes_text(c)}, {c.count} per step. An all-gather sends half; the compiler chose "
            "this, another mesh shape or topology may avoid it.",
            round(wire_bytes(c) * c.count / 2),
        )
        for c in rows
        if c.is_sum_of_pieces
    ]


def _repeated_gathers(rows: Iterable[Collective]) -> list[Lint]:
    """Gathers in a loop whose input is the same in every iteration."""
    return [
        Lint(
            "repeated-gather",
            f"{_where(c)} is gathered over {axes_text(c)} {c.count} times per step, the same "
            f"{format_bytes(c.bytes)} in every iteration of a loop. Gather it before the loop.",
            c.bytes * (c.count - 1),
        )
        for c in rows
        if c.is_loop_invariant and c.count > 1
    ]


def _unexpected_axes(rows: Iterable[Collective], expected: set[str]) -> list[Lint]:
    """Collectives over other axes than the expected ones."""
    found = []
    for c in rows:
        if c.axes == UNKNOWN_AXES:
            message = f"{c.kind} of {format_bytes(c.bytes)} over groups that are no mesh axes"
            found.append(Lint("unknown-groups", f"{message}: {_where(c)}", c.bytes * c.count))
        elif not set(c.axes) <= expected:
            message = (
                f"{c.kind} of {format_bytes(c.bytes)} over {axes_text(c)}, {c.count} per step: "
                f"{_where(c)}. Expected only {', '.join(sorted(expected)) or 'no axis'}."
            )
            found.append(Lint("unexpected-axis", message, c.bytes * c.count))
    return found


def _unexpected_gathers(
    rows: Iterable[Collective], expected: tuple[str, ...], min_bytes: int
) -> list[Lint]:
    """Large all-gathers of anything but the expected parameters."""
    found = []
    for c in rows:
        parts = c.parameter.split(" + ")
        known = all(any(fnmatch.fnmatchcase(p, glob) for glob in expected) for p in parts)
        if c.kind == "all-gather" and c.bytes >= min_bytes and not known:
            message = (
                f"{format_bytes(c.bytes)} gathered over {axes_text(c)}, {c.count} per step: "
                f"{_where(c)}. It should stay sharded; constrain what uses it."
            )
            found.append(Lint("unexpected-gather", message, c.bytes * c.count))
    return found


def lint_collectives(
    collectives: Iterable[Collective],
    *,
    expected_axes: Iterable[str] | None = None,
    expected_gathers: Iterable[str] | None = None,
    min_bytes: int = MIB,
) -> list[Lint]:
    """Suspicions about a step's communication, largest first.

    Args:
        collectives: what `collectives_of` returned.
        expected_axes: names of the mesh axes that may communicate; None: not checked.
        expected_gathers: globs of the arguments that may be gathered whole, for example
            `"state.params*"`; None: not checked.
        min_bytes: gathers smaller than this, and reductions, are no `unexpected-gather`.

    Example:
        >>> stray = Collective("all-to-all", 4096, ("tensor",), source="model.py:12")
        >>> [lint.kind for lint in lint_collectives([stray], expected_axes=["fsdp"])]
        ['unexpected-axis']
    """
    rows = list(collectives)
    found = _sliced_reductions(rows) + _summed_gathers(rows) + _repeated_gathers(rows)
    if expected_axes is not None:
        found += _unexpected_axes(rows, set(expected_axes))
    if expected_gathers is not None:
        found += _unexpected_gathers(rows, tuple(expected_gathers), min_bytes)
    return sorted(found, key=lambda lint: -lint.bytes)
