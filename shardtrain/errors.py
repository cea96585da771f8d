"""Every error shardtrain raises on purpose.

Each says what is wrong, where (parameter path, mesh axis, process), the numbers, and what to do.
All derive from `ShardtrainError`, a `ValueError`, so `except ValueError` keeps working.
"""

import difflib
from collections.abc import Iterable


class ShardtrainError(ValueError):
    """Base of all errors a user of shardtrain can cause and mend."""


class SimulationError(ShardtrainError):
    """Virtual CPU devices cannot be provided because JAX already started with fewer."""


class StrategyError(ShardtrainError):
    """A `Strategy` field has a value that cannot be used, or two fields contradict each other."""


class MeshError(ShardtrainError):
    """The strategy's axis sizes do not fit the devices."""


class ModelError(ShardtrainError):
    """The model is none of: Linen module, NNX module, NNX factory, `Functional`."""


class LossContractError(ShardtrainError):
    """The loss function returned something that cannot be averaged exactly."""


class BatchError(ShardtrainError):
    """The batch has a shape, dtype or structure the plan was not made for."""


class PartitionError(ShardtrainError):
    """A parameter cannot be partitioned as asked."""


class UnknownAxisError(PartitionError):
    """A logical axis name, rule or mesh axis is not known (often a typo)."""


class UnusedRuleError(PartitionError):
    """A rule matched no parameter."""


class IndivisibleError(PartitionError):
    """A dim is not divisible by the product of the mesh axes that should shard it."""


class DoubleAxisError(PartitionError):
    """One mesh axis would shard two dims of one array."""


class ReplicationError(PartitionError):
    """More bytes than allowed would be replicated on every device."""


class ShardingDriftError(PartitionError):
    """The compiled program placed an array differently from the plan."""


class ScheduleError(ShardtrainError):
    """A pipeline schedule is unknown, invalid or does not fit the model or batch."""


class StageSplitError(ShardtrainError):
    """The model cannot be split into equal pipeline stages."""


class DataError(ShardtrainError):
    """The data source is empty, unreadable or differs between processes."""


class CheckpointError(ShardtrainError):
    """A checkpoint cannot be written or read."""


class RestoreMismatch(CheckpointError):
    """The checkpoint's tree, shapes or dtypes differ from the plan's."""


class HardwareError(ShardtrainError):
    """A hardware string is not known."""


class KernelNeedsDevicesError(HardwareError):
    """A kernel of the step cannot be lowered without the devices it would run on."""


class DistributedError(ShardtrainError):
    """Processes could not be joined, or disagree."""


class VerificationError(ShardtrainError):
    """A sharded run differs from the same run on one device."""


class CollectiveMismatch(ShardtrainError):
    """The compiled program communicates differently from what was asserted."""


class OutOfMemoryError(ShardtrainError):
    """A compiled step needs more memory than one device has."""


class XlaOptionError(ShardtrainError):
    """The compiler in use does not know a flag of `Strategy(xla=...)`, or not that value."""


class CompilerBugError(ShardtrainError):
    """A known compiler bug would give wrong numbers, and cannot be avoided here."""


class SweepError(ShardtrainError):
    """A sweep cannot be run as described."""


class UnstableRunError(ShardtrainError):
    """The loss is bad again and again, and going back did not help."""


class ReplicaDivergenceError(ShardtrainError):
    """Copies of one array on several devices no longer hold the same bits."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, or the list of all known names."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return "known: " + ", ".join(known)
