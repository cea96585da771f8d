"""Step time against memory, one dot per layout, as SVG."""

import html
import math
from collections.abc import Callable, Sequence

from shardtrain.explore.choice import Choice, axes_text, details_text, seconds_text
from shardtrain.explore.exploration import Exploration
from shardtrain.explore.style import COLOURS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 600, 400, 58, 14, 14, 46
SPLITS = ("data, fsdp only", "+ tensor", "+ pipeline", "+ tensor + pipeline", "+ context, expert")
"""What the dots' colours mean."""

MOST_DOTS = 600
SLOWEST = 2.5
"""Layouts this many times as slow as the fastest are left out of the picture."""


def split_of(choice: Choice) -> int:
    """Index into `SPLITS`."""
    s = choice.strategy
    if s.context > 1 or s.expert > 1:
        return 4
    return (s.tensor > 1) + 2 * (s.pipeline > 1)


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """Layouts that no other beats in both time and memory, fastest first."""
    front: list[Choice] = []
    for one in sorted(choices, key=lambda c: (c.step_time, c.memory_bytes)):
        if not front or one.memory_bytes < front[-1].memory_bytes:
            front.append(one)
    return front


def thinned(found: Exploration) -> list[Choice]:
    """At most about `MOST_DOTS` layouts: the front, each family's best, one per small square."""
    near = near_best(found)
    fast = min(c.step_time for c in near)
    most = max(c.memory_bytes for c in near)
    for size in (60, 40, 25, 15):
        kept = {id(c): c for c in (*pareto(near), *near[:20])}
        best = {id(c) for c in found.kinds.values()}
        kept |= {id(c): c for c in near if id(c) in best}
        squares: dict[tuple[int, int, int], Choice] = {}
        for one in near:
            x = int(size * (one.step_time / fast - 1) / (SLOWEST - 1))
            squares.setdefault((x, int(size * one.memory_bytes / most), split_of(one)), one)
        kept |= {id(c): c for c in squares.values()}
        if len(kept) <= MOST_DOTS:
            break
    return list(kept.values())


def near_best(found: Exploration) -> list[Choice]:
    """Layouts at most `SLOWEST` times as slow as the fastest."""
    fast = min(c.step_time for c in found.ranked)
    return [c for c in found.ranked if c.step_time <= SLOWEST * fast]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= count)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step) + 1)]


def scatter_svg(found: Exploration, anchor: str) -> str:
    """The scatter; a dot links to its family's row in the table.

    Args:
        found: what to draw; something must fit.
        anchor: prefix of the rows' ids.
    """
    dots = thinned(found)
    rooms = {s.hardware.chip.memory for s in found.searches}
    slow, fast = max(c.step_time for c in dots), min(c.step_time for c in dots)
    most = max(rooms) * 1.03
    low, high = fast - 0.05 * (slow - fast) - 0.01 * fast, slow + 0.03 * (slow - fast) + 0.01 * fast
    across = lambda t: LEFT + (t - low) / (high - low) * (WIDTH - LEFT - RIGHT)
    up = lambda b: HEIGHT - BOTTOM - b / most * (HEIGHT - TOP - BOTTOM)
    parts = [*_axes(low, high, most, across, up)]
    for room in sorted(rooms):
        y = up(room)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    front = " ".join(f"{across(c.step_time):.1f},{up(c.memory_bytes):.1f}" for c in pareto(dots))
    parts.append(f'<polyline class="front" points="{front}"/>')
    rows = {id(c): n for n, c in enumerate(found.kinds.values())}
    for one in sorted(dots, key=lambda c: -c.step_time):
        x, y = across(one.step_time), up(one.memory_bytes)
        best = one is found.best
        known = id(one) in rows
        size, opacity = (8, 1.0) if best else (6, 0.95) if known else (3.5, 0.55)
        stroke = 'stroke="var(--ink)" stroke-width="2"' if best else 'stroke="var(--card)"'
        dot = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{COLOURS[split_of(one)]}" '
            f'fill-opacity="{opacity}" {stroke}><title>{html.escape(_told(one))}</title></circle>'
        )
        parts.append(f'<a href="#{anchor}{rows[id(one)]}">{dot}</a>' if known else dot)
    label = "Step time against memory on each device, one dot per layout"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'style="font-size:14px">{"".join(parts)}</svg>'
    )


def _told(one: Choice) -> str:
    fields = vars(one.strategy)
    return (
        f"{one.hardware}: {axes_text(fields)}; {details_text(fields)}\n"
        f"{seconds_text(one.step_time)}, {one.memory_bytes / 1e9:.1f} GB, MFU {one.mfu:.1%}\n"
        f"{one.reason}"
    )


def _axes(
    low: float, high: float, most: float,
    across: Callable[[float], float], up: Callable[[float], float],
) -> list[str]:  # fmt: skip
    """Grid lines, numbers and titles."""
    parts = []
    base = HEIGHT - BOTTOM
    for value in ticks(0, most / 1e9):
        y = up(value * 1e9)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 5}" text-anchor="end">'
                     f"{value:g}</text>")  # fmt: skip
    for value in ticks(low, high):
        x = across(value)
        parts.append(f'<line class="rule" x1="{x}" x2="{x}" y1="{TOP}" y2="{base}"/>')
        parts.append(f'<text class="soft" x="{x}" y="{base + 18}" text-anchor="middle">'
                     f"{_tick_text(value)}</text>")  # fmt: skip
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">step time</text>')
    parts.append(f'<text transform="translate(15 {(TOP + base) / 2}) rotate(-90)" '
                 'text-anchor="middle">GB on each device</text>')  # fmt: skip
    return parts


def _tick_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.5 else f"{1e3 * seconds:.3g} ms"
