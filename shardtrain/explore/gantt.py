"""The pipeline of a layout over time, as SVG that follows the page's colours."""

from shardtrain.errors import ScheduleError
from shardtrain.explore.choice import Choice
from shardtrain.pipeline.draw import NAMES, SvgLook, svg
from shardtrain.pipeline.schedules import Schedule, make_schedule
from shardtrain.pipeline.tasks import DEFAULT_COSTS, KINDS

PAGE = SvgLook(
    colours={"F": "var(--c0)", "B": "var(--c1)", "W": "var(--c2)"},
    border="var(--card)",
    row=26,
    left=62,
    width=938.0,
    least=0.0,
    attributes='viewBox="0 0 {width:.0f} {height}" role="img" aria-label="pipeline over time" '
    'style="font-size:13px;min-width:640px"',
    text=' style="fill:#10151c;font-size:11px;pointer-events:none"',
)


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
    return svg(schedule, schedule.table.phases, DEFAULT_COSTS, PAGE)


def gantt_key(schedule: Schedule) -> list[tuple[str, str]]:
    """(colour, name) of the kinds of task in it."""
    used = {task.kind for task in schedule.tasks}
    return [(PAGE.colours[kind], NAMES[kind]) for kind in KINDS if kind in used]
