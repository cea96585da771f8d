"""What this machine really does, and what is wrong with it."""

from shardtrain.doctor.examine import Examination, examine

__all__ = ["Examination", "examine"]
