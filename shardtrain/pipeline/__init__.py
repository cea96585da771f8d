"""Pipeline parallelism: schedules as data, stage split of unmodified models, one SPMD executor."""

from shardtrain.pipeline.assemble import Pipeline, make_pipeline
from shardtrain.pipeline.executor import make_pipeline_grad
from shardtrain.pipeline.schedules import Schedule, make_schedule, schedule_from_csv
from shardtrain.pipeline.stages import (
    StageLayout,
    StageMajor,
    from_stage_major,
    from_stage_major_tree,
    stage_major_specs,
    to_stage_major,
)

__all__ = [
    "Pipeline",
    "Schedule",
    "StageLayout",
    "StageMajor",
    "from_stage_major",
    "from_stage_major_tree",
    "make_pipeline",
    "make_pipeline_grad",
    "make_schedule",
    "schedule_from_csv",
    "stage_major_specs",
    "to_stage_major",
]
