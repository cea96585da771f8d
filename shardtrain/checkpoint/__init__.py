"""Checkpoints: committed, verified, mesh-free steps on disk."""

from shardtrain.checkpoint.checkpointer import Checkpointer
from shardtrain.checkpoint.divergence import Divergence, has_replicas, replica_divergence
from shardtrain.checkpoint.export import export
from shardtrain.checkpoint.fingerprint import as_text, fingerprint
from shardtrain.checkpoint.memory import MemorySnapshot
from shardtrain.checkpoint.portable import Inspection, inspect, restore
from shardtrain.checkpoint.protocol import CheckpointPlan

__all__ = [
    "CheckpointPlan",
    "Checkpointer",
    "Divergence",
    "Inspection",
    "MemorySnapshot",
    "as_text",
    "export",
    "fingerprint",
    "has_replicas",
    "inspect",
    "replica_divergence",
    "restore",
]
