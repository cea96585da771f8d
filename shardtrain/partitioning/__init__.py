"""From abstract trees, rules and axis sizes to one sharding per array, and why."""

from shardtrain.partitioning.batch import batch_specs
from shardtrain.partitioning.optimizer import optimizer_specs
from shardtrain.partitioning.resolve import Inferred, LeafPlan, check_replication, partition_tree

__all__ = [
    "Inferred",
    "LeafPlan",
    "batch_specs",
    "check_replication",
    "optimizer_specs",
    "partition_tree",
]
