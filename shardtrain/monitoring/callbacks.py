"""What `st.fit` tells about a run: host-side numbers only, on every process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """A run about to start.

    Args:
      plan: The plan it trains.
      first_step: Steps already done (not 0 after a resume).
      num_steps: Steps it will have done at the end.
      directory: Where it writes, or None.
      examples_per_step: Global batch size.
      tokens_per_step: Integer positions of the largest `[batch, sequence]` leaf, or None.
      is_main: Whether this process writes and prints (process 0).
    """

    plan: Any
    first_step: int
    num_steps: int
    directory: Path | None
    examples_per_step: int
    tokens_per_step: int | None
    is_main: bool


class Callback(Protocol):
    """Called by `st.fit` on every process, with numbers already on the host.

    Subclass it and override what you need. Nothing a callback gets is on a device, so none can
    hang a run of several processes by fetching something on one of them only; write files and
    print where `run.is_main`.

    Example:
      >>> class PrintLoss(Callback):
      ...     def on_step(self, step, metrics):
      ...         print(step, metrics["loss"])
    """

    def on_start(self, run: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After `step` optimizer steps; `metrics` adds `seconds` and `data_seconds` of the step."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation; every example counted once."""

    def on_checkpoint(self, step: int) -> None:
        """A save of this step was started."""

    def on_rollback(self, step: int) -> None:
        """The run went back to the state of `step`; the steps after it are done again."""

    def on_end(self, result: Any) -> None:
        """After the last step, or a clean stop, with the `FitResult`."""
