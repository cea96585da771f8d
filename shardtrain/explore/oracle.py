"""The estimate against the run: one line at the end of `st.fit`, one file in its directory."""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from shardtrain.errors import ShardtrainError
from shardtrain.explore.choice import seconds_text
from shardtrain.monitoring.callbacks import Callback, RunInfo
from shardtrain.plan import Plan
from shardtrain.plan.report import local_hardware

WARM_UP = 2
"""Steps that are not measured: compilation, caches."""

FEWEST = 5
"""Steps that must be left for a median."""

WORTH = 0.05
"""Share of the run's time that compiling once more for the estimate may take."""


@dataclass(frozen=True)
class EstimateCheck:
    """A plan's estimate beside what was measured.

    Attributes:
        estimated: seconds per step, by `plan.estimate()`.
        measured: seconds per step, the median.
        hardware: what the estimate was for.
        terms: named seconds of the estimate.
        strategy: the layout.
    """

    estimated: float
    measured: float
    hardware: str
    terms: Mapping[str, float]
    strategy: str

    @property
    def ratio(self) -> float:
        """Measured over estimated."""
        return self.measured / self.estimated

    def __str__(self) -> str:
        off = abs(self.ratio - 1)
        how = "slower" if self.ratio > 1 else "faster"
        off_text = f"{off:.0%} {how}" if self.ratio < 2 else f"{self.ratio:.1f} times as long"
        hint = ""
        if self.hardware.startswith("cpu"):
            hint = "; `shardtrain doctor` measures this machine for closer estimates"
        return (
            f"estimate {seconds_text(self.estimated)} per step on {self.hardware}, measured "
            f"{seconds_text(self.measured)}: {off_text}{hint}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, in seconds."""
        return {**vars(self), "terms": dict(self.terms), "ratio": self.ratio}


def estimate_vs_measured(plan: Plan, measured_step_s: float) -> EstimateCheck:
    """What the plan's estimate says of a step that was measured.

    Compiles the step where `plan.compile()` has not.

    Args:
        plan: what ran.
        measured_step_s: seconds of one step.
    """
    estimate = plan.estimate()
    hardware = plan.hardware or local_hardware(plan.mesh)
    return EstimateCheck(
        estimate.step_time, measured_step_s, hardware, dict(estimate.terms), str(plan.strategy)
    )


class StepOracle(Callback):
    """Times the steps of a run; at its end prints the estimate beside them, and keeps both.

    Nothing is said where there are too few steps, or where compiling once more would cost more
    than a twentieth of the run; with several processes only if the plan is compiled already.

    Args:
      prints: print the line.
    """

    def __init__(self, prints: bool = True):
        self._prints = prints
        self._run: RunInfo | None = None
        self._times: list[float] = []
        self._started = 0.0

    def on_start(self, run: RunInfo) -> None:
        """Remember the plan."""
        self._run, self._times, self._started = run, [], time.perf_counter()

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The moment a step's metrics arrive; the time between two is a step's."""
        self._times.append(time.perf_counter())

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """A pause, which the median leaves out."""

    def on_checkpoint(self, step: int) -> None:
        """A pause, which the median leaves out."""

    def on_rollback(self, step: int) -> None:
        """Time spent going back is no step's."""
        self._times.clear()

    def on_end(self, result: Any) -> None:
        """Print the line and write `estimate.json`."""
        failed = sys.exc_info()[0] is not None or result is None or result.stopped
        if failed or self._run is None or not self._run.is_main or not self._is_worth_it():
            return
        times = self._times[WARM_UP:]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        try:
            check = estimate_vs_measured(self._run.plan, statistics.median(gaps))
        except ShardtrainError as error:
            print(f"no estimate: {error}")
            return
        if self._prints:
            print(check)
        if self._run.directory is not None:
            write_check(check, self._run.directory)

    def _is_worth_it(self) -> bool:
        """Whether there is a median, and compiling is cheap beside the run."""
        assert self._run is not None
        if len(self._times) < WARM_UP + FEWEST + 1:
            return False
        if self._run.plan.is_compiled:
            return True
        first = self._times[0] - self._started
        whole = self._times[-1] - self._started
        return jax.process_count() == 1 and first < WORTH * whole


def write_check(check: EstimateCheck, directory: Path) -> None:
    """Keep it as `estimate.json` in a run directory."""
    text = json.dumps(check.to_dict(), indent=1)
    (directory / "estimate.json").write_text(text + "\n", encoding="utf-8")
