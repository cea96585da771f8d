"""Pictures of a timetable: text for terminals, SVG for notebooks, matplotlib for papers.

Imports no JAX; matplotlib is imported when a figure is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardtrain.pipeline.schedule_table import Phase
from shardtrain.pipeline.tasks import KINDS, Kind, SlotCosts, Task, Timetable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito, readable for the colour-blind.
COLOURS: dict[Kind, str] = {"F": "#56B4E9", "B": "#E69F00", "W": "#009E73"}
NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "W": "weight gradient"}


def label(task: Task, virtual_stages: int) -> str:
    """`F3`, or `F3.1` for virtual stage 1 where there are several."""
    tail = f".{task.virtual_stage}" if virtual_stages > 1 else ""
    return f"{task.kind}{task.microbatch}{tail}"


def text(table: Timetable) -> str:
    """One column per tick; every stage has one line per kind of task."""
    cells = {(t.stage, t.kind, t.tick): label(t, table.virtual_stages) for t in table.tasks}
    width = max((len(name) for name in cells.values()), default=1)
    margin = len(f"stage {table.num_stages - 1}")
    kinds = KINDS if table.splits_weight else KINDS[:2]
    lines = []
    for stage in range(table.num_stages):
        for kind in kinds:
            head = f"stage {stage}" if kind == "F" else ""
            names = (cells.get((stage, kind, tick), ".") for tick in range(table.num_ticks))
            row = " ".join(name.ljust(width) for name in names)
            lines.append(f"{head:<{margin}} | {row}".rstrip())
    return "\n".join(lines)


def boxes(
    table: Timetable, found: tuple[Phase, ...], costs: SlotCosts
) -> tuple[list[tuple[Task, float, float]], float]:
    """(task, start, width) on the lockstep clock, and the length of the step."""
    by_tick: dict[tuple[int, Kind], list[Task]] = {}
    for task in table.tasks:
        by_tick.setdefault((task.tick, task.kind), []).append(task)
    placed, now = [], 0.0
    for phase in found:
        for tick in range(phase.start, phase.stop):
            for kind in phase.slots:
                width = costs.of(kind, table.splits_weight, table.virtual_stages)
                placed += [(task, now, width) for task in by_tick.get((tick, kind), [])]
                now += width
    return placed, now


@dataclass(frozen=True)
class SvgLook:
    """How the SVG looks.

    Args:
      colours: Fill of each kind of task.
      border: Colour between tasks.
      row: Height of a stage, pixels.
      left: Room for the names of stages, pixels.
      width: Width of the step, pixels; `least` pixels per forward where that is wider.
      least: See `width`.
      attributes: Of the `<svg>` element; `{width}` and `{height}` are filled in.
      text: Attributes of the numbers on tasks.
    """

    colours: Mapping[Kind, str]
    border: str
    row: int
    left: int
    width: float
    least: float
    attributes: str
    text: str = ""


NOTEBOOK = SvgLook(
    colours=COLOURS,
    border="white",
    row=22,
    left=60,
    width=900.0,
    least=4.0,
    attributes='xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
    'style="font:11px sans-serif;background:#f4f4f4"',
)


def svg(
    table: Timetable, found: tuple[Phase, ...], costs: SlotCosts, look: SvgLook = NOTEBOOK
) -> str:
    """The step over time as a self-contained SVG element; idle time stays empty."""
    placed, length = boxes(table, found, costs)
    unit = max(look.width / length, look.least)
    rows = [
        f'<text x="0" y="{stage * look.row + look.row * 0.7:.0f}">stage {stage}</text>'
        for stage in range(table.num_stages)
    ]
    for task, start, width in placed:
        x, y, w = look.left + start * unit, task.stage * look.row + 1, width * unit
        shade = 1.0 - 0.5 * task.virtual_stage / table.virtual_stages
        says = f"{NAMES[task.kind]} of microbatch {task.microbatch}, stage {task.stage}"
        rows.append(
            f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{look.row - 2}" '
            f'stroke="{look.border}" fill="{look.colours[task.kind]}" fill-opacity="{shade:.2f}">'
            f"<title>{says}</title></rect>"
        )
        if w > 12:
            middle = f'x="{x + w / 2:.1f}" y="{y + look.row * 0.64:.0f}" text-anchor="middle"'
            rows.append(f"<text {middle}{look.text}>{task.microbatch}</text>")
    size = {"width": look.left + length * unit, "height": table.num_stages * look.row}
    return f"<svg {look.attributes.format(**size)}>{''.join(rows)}</svg>"


def figure(table: Timetable, found: tuple[Phase, ...], costs: SlotCosts) -> "Figure":
    """The step over time as a matplotlib figure (not registered with pyplot)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    placed, length = boxes(table, found, costs)
    fig = Figure(figsize=(12, 0.6 + 0.4 * table.num_stages), layout="constrained")
    axes = fig.subplots()
    for task, start, width in placed:
        shade = 1.0 - 0.5 * task.virtual_stage / table.virtual_stages
        bar = axes.barh(task.stage, width, left=start, height=0.9)[0]
        bar.set(facecolor=COLOURS[task.kind], alpha=shade, edgecolor="white")
        if width > length / 80:
            axes.text(
                start + width / 2,
                task.stage,
                str(task.microbatch),
                ha="center",
                va="center",
                fontsize=7,
            )
    axes.set(xlim=(0, length), xlabel="time (forward of one stage = 1)", ylabel="stage")
    axes.set_yticks(range(table.num_stages))
    axes.invert_yaxis()
    axes.set_title(f"{table.name}, {table.num_microbatches} microbatches", fontsize=9)
    used = [kind for kind in KINDS if any(t.kind == kind for t in table.tasks)]
    fig.legend(
        handles=[Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in used],
        loc="outside right upper", fontsize=7,
    )  # fmt: skip
    return fig
