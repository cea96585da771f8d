"""Stacked bars as HTML: memory by class, time by term, bytes by axis."""

import html
from collections.abc import Mapping, Sequence

from shardtrain.explore.style import COLOURS
from shardtrain.planner.traffic import format_bytes

Row = tuple[str, Mapping[str, float], str]
"""(label, part -> size, text at the end of the bar)."""


def bars(rows: Sequence[Row], parts: Sequence[str], unit: str, limits: Sequence[float] = ()) -> str:
    """Stacked bars with a key; every segment says its size when pointed at.

    Args:
        rows: one per bar.
        parts: in which order the parts are drawn; at most seven.
        unit: "B" or "s", for what segments say.
        limits: one per bar, drawn as a dashed line; none: no lines.
    """
    longest = max([*limits, *(sum(sizes.values()) for _, sizes, _ in rows)]) or 1.0
    lines = []
    for row, (label, sizes, end) in enumerate(rows):
        cells = "".join(
            f'<i style="width:{100 * sizes[name] / longest:.2f}%;background:{COLOURS[n]}" '
            f'title="{name}: {_size(sizes[name], unit)}"></i>'
            for n, name in enumerate(parts)
            if sizes.get(name, 0.0) > 0
        )
        mark = f'<u style="left:{100 * limits[row] / longest:.2f}%"></u>' if limits else ""
        name = html.escape(label)
        lines.append(
            f'<div class="row"><span><span>{name}</span><span class="soft">{html.escape(end)}'
            f'</span></span><div class="bar">{cells}{mark}</div></div>'
        )
    used = [n for n, name in enumerate(parts) if any(sizes.get(name) for _, sizes, _ in rows)]
    return "".join(lines) + key([(COLOURS[n], parts[n]) for n in used])


def key(entries: Sequence[tuple[str, str]]) -> str:
    """Coloured squares with names."""
    return '<div class="key">' + "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for colour, name in entries
    ) + "</div>"  # fmt: skip


def _size(value: float, unit: str) -> str:
    return format_bytes(value) if unit == "B" else f"{value:.3g} s"
