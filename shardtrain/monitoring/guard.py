"""Is this loss believable? The judgement on one step, from host-side numbers only."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shardtrain.errors import ShardtrainError

Reason = Literal["not finite", "spike"]

_LEAST_REACH = 0.01
"""A flat curve has no noise to compare with: a hundredth of the loss counts as noise."""


@dataclass(frozen=True)
class LossGuard:
    """When a step of `st.fit` counts as bad, and how often the run may go back.

    A step is bad if its loss or gradient is not finite, or if its loss is a spike: above the median
    of the last `window` good losses by more than `spike` times what the largest of them was.

    Args:
      spike: See above; None: spikes are not looked for.
      window: Good losses to compare with; before there are so many, nothing is a spike.
      patience: Steps in a row that are not finite before the run goes back. One alone needs none:
        the compiled step has left the state as it was.
      max_rollbacks: How often the run goes back without `window` good steps in between before it
        ends with `UnstableRunError`.

    Raises:
      ShardtrainError: A number is out of range.

    Example:
      >>> judge(LossGuard(window=4), {"loss": 9.0, "skipped": 0.0, "weight": 8.0}, [2, 2.1, 2, 1.9])
      'spike'
    """

    spike: float | None = 4.0
    window: int = 64
    patience: int = 3
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        if self.spike is not None and self.spike <= 0:
            raise ShardtrainError(f"LossGuard(spike={self.spike}) must be positive, or None")
        for name, least in (("window", 2), ("patience", 1), ("max_rollbacks", 0)):
            if getattr(self, name) < least:
                raise ShardtrainError(
                    f"LossGuard({name}={getattr(self, name)}) must be at least {least}"
                )


def judge(guard: LossGuard, metrics: Mapping[str, float], recent: Sequence[float]) -> Reason | None:
    """What is wrong with a step, or None.

    Args:
      guard: The rule.
      metrics: `loss`, `skipped` and `weight` of the step. A step without any weight is not bad.
      recent: Losses of the good steps before it, oldest first.
    """
    if metrics["weight"] == 0:
        return None
    if metrics["skipped"]:
        return "not finite"
    if guard.spike is None or len(recent) < guard.window:
        return None
    recent = recent[-guard.window :]
    median = statistics.median(recent)
    reach = max(max(recent) - median, _LEAST_REACH * abs(median))
    return "spike" if metrics["loss"] - median > guard.spike * reach else None
