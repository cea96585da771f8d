"""Pictures of a timetable: text for terminals, SVG for notebooks, matplotlib for papers.

Imports no JAX; matplotlib is imported when a figure is asked for.
"""

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


def svg(table: Timetable, found: tuple[Phase, ...], costs: SlotCosts) -> str:
    """The step over time as a self-contained SVG element."""
    placed, length = boxes(table, found, costs)
    unit, height, left = max(900.0 / length, 4.0), 22, 60
    rows = [
        f'<text x="0" y="{stage * height + 15}">stage {stage}</text>'
        for stage in range(table.num_stages)
    ]
    for task, start, width in placed:
        x, y, w = left + start * unit, task.stage * height + 1, width * unit
        shade = 1.0 - 0.5 * task.virtual_stage / table.virtual_stages
        rows.append(
            f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{height - 2}" stroke="white" '
            f'fill="{COLOURS[task.kind]}" fill-opacity="{shade:.2f}"><title>{task}</title></rect>'
        )
        if w > 12:
            name = task.microbatch
            rows.append(
                f'<text x="{x + w / 2:.1f}" y="{y + 14}" text-anchor="middle">{name}</text>'
            )
    size = f'width="{left + length * unit:.0f}" height="{table.num_stages * height}"'
    style = 'style="font:11px sans-serif;background:#f4f4f4"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(rows)}</svg>'


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
