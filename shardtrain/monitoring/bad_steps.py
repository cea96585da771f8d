"""Which steps of a run were bad: `bad_steps.jsonl` in its directory.

A step is called by its number in the metrics: step 7 is the seventh, of batch `loader.batch(6)`.
What is listed here is skipped by every later attempt at the run, so that a restart does what the
interrupted attempt would have done, and `shardtrain replay` knows where to look.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from shardtrain.errors import ShardtrainError
from shardtrain.monitoring.guard import Reason

FILE = "bad_steps.jsonl"


@dataclass(frozen=True)
class BadStep:
    """One step that was not taken.

    Args:
      step: Its number, from 1.
      reason: "not finite" or "spike".
      loss: What was seen.
      grad_norm: What was seen.
      went_back_to: The step whose state the run went on from; None: it did not have to go back.
      replay_from: A checkpoint to replay it from, 0 for the first state; it is kept.
      seed: Of the run's first state.
    """

    step: int
    reason: Reason
    loss: float
    grad_norm: float
    went_back_to: int | None
    replay_from: int
    seed: int

    def __str__(self) -> str:
        back = "" if self.went_back_to is None else f"; went back to step {self.went_back_to}"
        return (
            f"step {self.step}: {self.reason} (loss {self.loss:.4g}, gradient norm "
            f"{self.grad_norm:.4g}); its batch is skipped{back}"
        )


def append(directory: Path, bad: BadStep) -> None:
    """Add a record and flush it to the disk."""
    directory.mkdir(parents=True, exist_ok=True)
    record = asdict(bad) | {"loss": str(bad.loss), "grad_norm": str(bad.grad_norm)}
    with (directory / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> dict[int, BadStep]:
    """Step -> its newest record; a last line that a kill cut short is left out.

    Raises:
      ShardtrainError: A line is not a record.
    """
    path = directory / FILE
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines()
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record |= {"loss": float(record["loss"]), "grad_norm": float(record["grad_norm"])}
            found[record["step"]] = BadStep(**record)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ShardtrainError(f"{path} line {number} is not a bad step: {error}") from error
    return found
