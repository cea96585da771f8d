"""What a sweep found: trials, table, picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardtrain.errors import SweepError
from shardtrain.sweep.space import Hyperparameters
from shardtrain.tables import Table


@dataclass
class Trial:
    """One choice of hyperparameters.

    Args:
      number: From 0, in the order in which they were proposed.
      hyperparameters: What was tried.
      status: "running", "done", "stopped" (others were better) or "failed".
      steps: Optimizer steps done.
      losses: Training loss of each step.
      value: What trials are ranked by, smaller is better; None before the first ranking.
      reason: Why it failed or was stopped.
      state: Its `TrainState` (finished trials).
    """

    number: int
    hyperparameters: Hyperparameters
    status: str = "running"
    steps: int = 0
    losses: list[float] = field(default_factory=list, repr=False)
    value: float | None = None
    reason: str = ""
    state: Any = field(default=None, repr=False)

    def fail(self, reason: str) -> None:
        """Leave the sweep; the others go on."""
        self.status, self.reason = "failed", reason

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts further steps first, then smaller values; failed trials last."""
        if self.status == "failed" or self.value is None:
            return (1, math.inf)
        return (-self.steps, self.value)


@dataclass(frozen=True, repr=False)
class SweepResult:
    """Trials of a sweep.

    Args:
      trials: In the order in which they were proposed.
      metric: What `value` is.
      programs: Training programs compiled.
    """

    trials: tuple[Trial, ...]
    metric: str
    programs: int

    @property
    def ranked(self) -> list[Trial]:
        """Best first."""
        return sorted(self.trials, key=lambda t: t.rank)

    @property
    def best(self) -> Trial:
        """The trial with the smallest value among those that trained longest.

        Raises:
          SweepError: All failed; says why the first did.
        """
        best = self.ranked[0]
        if best.status == "failed":
            first = self.trials[0]
            raise SweepError(f"all {len(self.trials)} trials failed; trial 0: {first.reason}")
        return best

    def table(self) -> Table:
        """Every trial, best first."""
        names = list(dict.fromkeys(n for t in self.trials for n in t.hyperparameters))
        rows = [
            (
                str(t.number),
                *(_shown(t.hyperparameters.get(n)) for n in names),
                str(t.steps),
                "-" if t.value is None else f"{t.value:.4g}",
                t.status + (f": {t.reason}" if t.reason else ""),
            )
            for t in self.ranked
        ]
        columns = (">trial", *(f">{n}" for n in names), ">steps", f">{self.metric}", "status")
        kinds = "one program" if self.programs == 1 else f"{self.programs} programs"
        title = f"{len(self.trials)} trials in {kinds}, best first"
        return Table(title, columns, tuple(rows))

    def plot(self) -> Any:
        """A figure: loss curves of all trials, and the value against each number tried."""
        from shardtrain.viz.sweep import sweep_figure

        return sweep_figure(self.ranked, self.metric)

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def survivors(trials: Sequence[Trial], share: int) -> list[Trial]:
    """The best `1 / share` of the running trials, at least one.

    Source: successive halving, Jamieson and Talwalkar 2016, arXiv:1502.07943.

    Args:
      trials: With values.
      share: Eta, the factor by which they become fewer.
    """
    running = sorted((t for t in trials if t.status == "running"), key=lambda t: t.rank)
    return running[: max(1, len(running) // share)]
