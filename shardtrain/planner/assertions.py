"""Assert in a test what a compiled step communicates."""

import io
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from shardtrain.errors import CollectiveMismatch
from shardtrain.planner.collectives import Collective
from shardtrain.planner.traffic import total_bytes

Key = str | tuple[str, str | tuple[str, ...]]
Expected = int | tuple[int | None, int]


class HasCollectives(Protocol):
    """Anything with a `.collectives()` method, such as a plan."""

    def collectives(self) -> Iterable[Collective]:
        """Its collectives."""
        ...


def _rows(source: HasCollectives | Iterable[Collective] | Any) -> list[Collective]:
    found: Any = getattr(source, "collectives", source)
    return list(found() if callable(found) else found)


def _normal(key: Key) -> tuple[str, tuple[str, ...] | None]:
    """`(kind, axes)`; axes None for a bare kind, which matches any axes."""
    if isinstance(key, str):
        return key, None
    kind, axes = key
    return kind, (axes,) if isinstance(axes, str) else tuple(axes)


def _matches(collective: Collective, kind: str, axes: tuple[str, ...] | None) -> bool:
    return collective.kind == kind and (axes is None or set(axes) == set(collective.axes))


def assert_collectives(
    source: HasCollectives | Iterable[Collective] | Any,
    expected: Mapping[Key, Expected],
    *,
    strict: bool = True,
    ignore_below: int = 0,
) -> None:
    """Fail unless a step communicates exactly what is expected.

    Args:
        source: a plan, a `Compiled`, or a list of collectives.
        expected: `(kind, axes)` or `kind` (any axes) -> executions per step, or
            `(executions, bytes)` with the payload of the step: `bytes x count` summed over matching
            collectives. `None` executions leaves the number open. `axes` is a name or a tuple of
            names, in any order.
        strict: also fail on collectives that no key matches.
        ignore_below: leave out collectives of fewer bytes per execution (a loss, a gradient norm).

    Raises:
        CollectiveMismatch: with a table of expected and found.

    Example:
        >>> step = [Collective("all-reduce", 400, ("data",), count=2)]
        >>> assert_collectives(step, {("all-reduce", "data"): (2, 800)})
    """
    rows = [c for c in _rows(source) if c.bytes >= ignore_below]
    lines: list[tuple[str, str, str, bool]] = []
    unmatched = list(rows)
    for key, value in expected.items():
        kind, axes = _normal(key)
        found = [c for c in rows if _matches(c, kind, axes)]
        unmatched = [c for c in unmatched if c not in found]
        count, size = value if isinstance(value, tuple) else (value, None)
        seen_count, seen_size = sum(c.count for c in found), total_bytes(found)
        good = count in (None, seen_count) and size in (None, seen_size)
        name = f"{kind} {'×'.join(axes) if axes is not None else '(any axes)'}"
        lines.append((name, _cell(count, size), _cell(seen_count, seen_size), good))
    if strict:
        lines += [
            (
                f"{c.kind} {'×'.join(c.axes)}",
                "none",
                _cell(c.count, c.bytes * c.count) + _where(c),
                False,
            )
            for c in unmatched
        ]
    if not all(good for *_, good in lines):
        raise CollectiveMismatch(_report(lines))


def _cell(count: int | None, size: int | None) -> str:
    times = "any number" if count is None else f"{count} per step"
    return times if size is None else f"{times}, {size} bytes"


def _where(collective: Collective) -> str:
    where = collective.parameter or collective.source or collective.operation_name
    return f" at {where}" if where else ""


def _report(lines: list[tuple[str, str, str, bool]]) -> str:
    """The comparison as text: rich's table without colours."""
    table = Table("collective", "expected", "found", "")
    for name, wanted, seen, good in lines:
        table.add_row(name, wanted, seen, "" if good else "differs")
    console = Console(width=160, color_system=None, file=io.StringIO(), record=True)
    console.print(table)
    wrong = sum(not good for *_, good in lines)
    text = console.export_text()
    return (
        f"{wrong} of {len(lines)} kinds of communication differ from what was asserted:\n{text}"
        "collectives_table(...) shows where they come from; ignore_below=N leaves out tiny ones."
    )
