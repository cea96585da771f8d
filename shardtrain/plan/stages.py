"""What `plan.explain()` says about a pipeline: who holds which layers, and what is sent."""

import math

from shardtrain.pipeline.schedules import Schedule
from shardtrain.pipeline.tasks import Kind
from shardtrain.plan.pipelined import Pipelined
from shardtrain.tables import bytes_text


def stage_notes(found: Pipelined) -> tuple[str, ...]:
    """The stages, their layers, and the bytes that go from stage to stage in one step."""
    schedule, model = found.pipeline.schedule, found.pipeline.model
    each, stages = model.count // schedule.num_chunks, schedule.num_stages
    chunks = lambda p: [_layers(p + v * stages, each) for v in range(schedule.virtual_stages)]
    notes = (
        f"{schedule.name}: {model.count} layers over {stages} stages, "
        f"{schedule.num_microbatches} microbatches, a bubble of {schedule.bubble_fraction:.1%}",
        "; ".join(f"stage {p}: {', '.join(chunks(p))}" for p in range(stages)),
        _sends(found),
    )
    return notes + ((model.note,) if model.note else ()) + found.findings


def send_bytes(found: Pipelined) -> int:
    """Bytes of activations that one device sends to the next stage in one tick."""
    sizes = found.layout.sizes
    spread = math.prod(sizes[a] for a in found.layout.batch_axes if a not in found.local_axes)
    return sum(x.size * x.dtype.itemsize for x in found.pipeline.model.carry) // spread


def ticks(schedule: Schedule, kind: Kind) -> int:
    """Ticks in which some stage does a task of this kind."""
    return sum(p.stop - p.start for p in schedule.table.phases if kind in p.slots)


def _sends(found: Pipelined) -> str:
    schedule, size = found.pipeline.schedule, send_bytes(found)
    forward, backward = ticks(schedule, "F"), ticks(schedule, "B")
    return (
        f"each device sends {bytes_text(size)} to the next stage in {forward} ticks and as much "
        f"back in {backward}: {bytes_text(size * (forward + backward))} per step"
    )


def _layers(chunk: int, each: int) -> str:
    first, last = chunk * each, (chunk + 1) * each - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"
