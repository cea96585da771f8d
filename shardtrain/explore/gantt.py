"""The pipeline of a layout over time, as SVG that follows the page's colours."""

from shardtrain.errors import ScheduleError
from shardtrain.explore.choice import Choice
from shardtrain.pipeline.draw import NAMES, boxes
from shardtrain.pipeline.schedules import Schedule, make_schedule
from shardtrain.pipeline.tasks import DEFAULT_COSTS, KINDS, Kind

COLOURS: dict[Kind, str] = {"F": "var(--c0)", "B": "var(--c1)", "W": "var(--c2)"}
WIDTH, ROW, LEFT = 1000, 26, 62


def shown_schedule(choice: Choice) -> Schedule | None:
    """The layout's schedule with few enough microbatches to be seen; None without a pipeline."""
    s = choice.strategy
    if s.pipeline <= 1 or s.pipeline > 16:
        return None
    count = min(s.num_microbatches, 2 * s.pipeline)
    try:
        return make_schedule(s.schedule, s.pipeline, count, s.virtual_stages)
    except ScheduleError:
        return None  # not a table this library has: nothing to draw


def gantt_svg(schedule: Schedule) -> str:
    """One row per stage; idle time stays empty."""
    placed, length = boxes(schedule, schedule.table.phases, DEFAULT_COSTS)
    unit = (WIDTH - LEFT) / length
    parts = [
        f'<text x="0" y="{stage * ROW + 18}">stage {stage}</text>'
        for stage in range(schedule.num_stages)
    ]
    for task, start, width in placed:
        x, y, w = LEFT + start * unit, task.stage * ROW + 2, width * unit
        shade = 1.0 - 0.5 * task.virtual_stage / schedule.virtual_stages
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{ROW - 4}" '
            f'stroke="var(--card)" fill="{COLOURS[task.kind]}" fill-opacity="{shade:.2f}">'
            f"<title>{NAMES[task.kind]} of microbatch {task.microbatch}, stage {task.stage}"
            "</title></rect>"
        )
        if w > 13:
            parts.append(
                f'<text x="{x + w / 2:.1f}" y="{y + 15}" text-anchor="middle" '
                f'style="fill:#10151c;font-size:11px;pointer-events:none">{task.microbatch}</text>'
            )
    height = schedule.num_stages * ROW
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="pipeline over time" '
        f'style="font-size:13px;min-width:640px">{"".join(parts)}</svg>'
    )


def gantt_key(schedule: Schedule) -> list[tuple[str, str]]:
    """(colour, name) of the kinds of task in it."""
    used = {task.kind for task in schedule.tasks}
    return [(COLOURS[kind], NAMES[kind]) for kind in KINDS if kind in used]
