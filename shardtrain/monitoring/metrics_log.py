"""Metrics on disk: JSON lines, and TensorBoard event files where wanted."""

import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtrain.errors import ShardtrainError
from shardtrain.monitoring.callbacks import Callback, RunInfo


class MetricsLog(Callback):
    """One JSON object per step and evaluation: `{"kind": "step", "step": 7, "loss": 2.31, ...}`.

    Each step is in the file once: when a run resumes from step 100, what a former attempt wrote
    about later steps goes. Values that are not finite are null, as JSON has no NaN.

    Args:
      path: The file; made when needed, its directory too.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
      >>> log = MetricsLog(path)
      >>> log.write({"kind": "step", "step": 1, "loss": 2.5})
      >>> read_metrics(path)[0]["loss"]
      2.5
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._writes = True

    def on_start(self, run: RunInfo) -> None:
        """Drop records of steps that will be done again."""
        self._writes = run.is_main
        if run.is_main:
            self._forget_after(run.first_step)

    def on_rollback(self, step: int) -> None:
        """Drop records of steps that will be done again."""
        if self._writes:
            self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [r for r in read_metrics(self.path) if r.get("step", 0) <= step]
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text("".join(json.dumps(r) + "\n" for r in kept), "utf-8")
        os.replace(fresh, self.path)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line."""
        self.write({"kind": "step", "step": step, **metrics})

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line."""
        self.write({"kind": "eval", "step": step, **metrics})

    def on_checkpoint(self, step: int) -> None:
        """One line."""
        self.write({"kind": "checkpoint", "step": step})

    def on_end(self, result: Any) -> None:
        """Nothing is open between two lines."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, with the time it was written."""
        if not self._writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {k: _finite(v) for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a kill cut short is left out.

    Raises:
      ShardtrainError: The file cannot be read, or a line in it is not JSON.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError as error:
        raise ShardtrainError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ShardtrainError(f"{path} line {number} is not JSON: {error}") from error
    return records


class TensorBoardLog(Callback):
    """The same numbers as TensorBoard event files.

    Args:
      directory: For the event files.

    Raises:
      ShardtrainError: The package tensorboardX is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        try:
            self._package: Any = importlib.import_module("tensorboardX")
        except ImportError as error:
            raise ShardtrainError(
                "TensorBoardLog needs the package tensorboardX: pip install "
                "'shardtrain[tensorboard]'"
            ) from error
        self.directory = Path(directory)
        self._writer: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Open the event file on process 0; steps that will be done again are purged."""
        if run.is_main:
            self._writer = self._package.SummaryWriter(
                str(self.directory), purge_step=run.first_step + 1
            )

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`train/<name>`."""
        self._write("train", step, metrics)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """`eval/<name>`."""
        self._write("eval", step, metrics)

    def on_checkpoint(self, step: int) -> None:
        """Not shown."""

    def on_rollback(self, step: int) -> None:
        """Steps done again are written again, beside the first time."""

    def on_end(self, result: Any) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
