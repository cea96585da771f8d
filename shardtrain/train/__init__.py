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
from shardtrain.train.step import RESERVED_METRICS, Step, clip, make_eval, make_step, over_rows

__all__ = [
    "RESERVED_METRICS",
    "GradFn",
    "Gradients",
    "LossFn",
    "Step",
    "TrainState",
    "clip",
    "first_microbatch_key",
    "make_eval",
    "make_step",
    "over_microbatches",
    "over_rows",
    "per_replica",
    "split_batch",
    "sum_replicas",
    "value_and_grad",
    "with_rng",
]
