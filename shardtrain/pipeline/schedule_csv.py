"""Schedules as CSV in torchtitan's form. Imports no JAX.

One row per stage. A cell is `<chunk><kind><microbatch>`, for instance `5B2`; an empty cell is idle.
Kinds: `F` forward, `B` whole backward, `I` input gradient alone, `W` weight gradient alone. Chunk
`k` must be in row `k % rows` (the looping placement).

Source of the format: pytorch `torch.distributed.pipelining.schedules`, `_PipelineScheduleRuntime`.
"""

import csv
import io
import re

from shardtrain.errors import ScheduleError
from shardtrain.pipeline.schedule_table import phases
from shardtrain.pipeline.tasks import KINDS, Op, Timetable

_CELL = re.compile(r"(\d*)([A-Z_]+)(\d*)")
_COMMUNICATION = ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "UNSHARD", "RESHARD", "REDUCE_GRAD")


def read_orders(text: str, name: str) -> list[list[Op]]:
    """Parse CSV text to one list of ops per stage.

    Sends, receives and parameter unsharding are skipped: the table implies them.

    Raises:
        ScheduleError: a cell is not in the form above or its chunk is in another stage's row.
    """
    rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    if not rows:
        raise ScheduleError(f"schedule {name!r} is empty: one row per stage is needed")
    splits = any("W" in cell for row in rows for cell in row)
    orders: list[list[Op]] = []
    for stage, row in enumerate(rows):
        ops = [
            _op(cell.strip(), stage, column, len(rows), splits, name)
            for column, cell in enumerate(row)
            if cell.strip()
        ]
        orders.append([op for op in ops if op is not None])
    return orders


def _op(cell: str, stage: int, column: int, stages: int, splits: bool, name: str) -> Op | None:
    where = f"schedule {name!r}, row {stage}, column {column}: {cell!r}"
    match = _CELL.fullmatch(cell)
    if match and match[2] in _COMMUNICATION:
        return None
    if not match or match[2] not in ("F", "B", "I", "W") or "" in match.groups():
        raise ScheduleError(
            f"{where} is not <chunk><kind><microbatch> with kind F, B, I or W, like 0F3"
        )
    chunk, kind = int(match[1]), match[2]
    if chunk % stages != stage:
        raise ScheduleError(
            f"{where}: chunk {chunk} belongs to stage {chunk % stages} of {stages} (chunk modulo "
            "stages). V-shaped placements cannot run here: activations travel one way round."
        )
    if splits and kind == "B":
        raise ScheduleError(
            f"{where}: the file splits weight gradients (W), so every backward must be I and W"
        )
    if kind == "I" and not splits:
        raise ScheduleError(f"{where}: an input gradient (I) needs its weight gradient (W) too")
    return Op("B" if kind == "I" else kind, int(match[3]), chunk // stages)


def write_orders(table: Timetable) -> str:
    """Format a timetable as CSV: the columns are the slots in use, tick by tick."""
    cells = {(t.tick, t.kind, t.stage): t for t in table.tasks}
    letter = {"F": "F", "B": "I" if table.splits_weight else "B", "W": "W"}
    columns = [
        (tick, kind)
        for phase in phases(table)
        for tick in range(phase.start, phase.stop)
        for kind in KINDS
        if kind in phase.slots
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for stage in range(table.num_stages):
        row = []
        for tick, kind in columns:
            task = cells.get((tick, kind, stage))
            row.append(f"{table.chunk(task)}{letter[kind]}{task.microbatch}" if task else "")
        writer.writerow(row)
    return out.getvalue()
