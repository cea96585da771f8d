"""Checkpoints: committed, verified, mesh-free steps on disk."""

from shardtrain.checkpoint.checkpointer import Checkpointer, CheckpointPlan
from shardtrain.checkpoint.fingerprint import as_text, fingerprint

__all__ = ["CheckpointPlan", "Checkpointer", "as_text", "fingerprint"]
