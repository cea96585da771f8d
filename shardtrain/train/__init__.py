"""State, gradients, step."""

from shardtrain.train.gradients import (
    GradFn,
    Gradients,
    LossFn,
    first_microbatch_key,
    over_microbatches,
    per_replica,
    split_batch,
    sum_replicas,
    value_and_grad,
)
from shardtrain.train.state import TrainState, with_rng
from shardtrain.train.step import (
    RESERVED_METRICS,
    Step,
    clip,
    global_norm,
    make_eval,
    make_step,
    make_update,
    over_rows,
    sharded_norm,
    step_metrics,
)

__all__ = [
    "RESERVED_METRICS",
    "GradFn",
    "Gradients",
    "LossFn",
    "Step",
    "TrainState",
    "clip",
    "first_microbatch_key",
    "global_norm",
    "make_eval",
    "make_step",
    "make_update",
    "over_microbatches",
    "over_rows",
    "per_replica",
    "sharded_norm",
    "split_batch",
    "step_metrics",
    "sum_replicas",
    "value_and_grad",
    "with_rng",
]
