"""Where each process is: one small file per process, rewritten at every change of phase.

Design. A supervisor must see the last phase of a process that was killed, stopped or stuck inside
the runtime, so nothing may be buffered or left to a thread. A record has a fixed size and is
written by a single `pwrite` into the page cache: a few microseconds, it survives `kill -9`, and a
checksum lets a reader notice the rare half-written record and read again.
"""

import json
import os
import time
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from shardtrain.errors import ShardtrainError, suggest

RUN_DIRECTORY_VARIABLE = "SHARDTRAIN_RUN_DIRECTORY"
PROCESS_INDEX_VARIABLE = "SHARDTRAIN_PROCESS_INDEX"

PHASES = {
    "import": "importing",
    "dist_init": "joining the other processes",
    "setup": "setting up",
    "restore": "restoring",
    "first_step": "compiling and running the first step",
    "data": "data loading",
    "dispatch": "dispatching the step",
    "wait": "waiting for the device",
    "ckpt": "saving a checkpoint",
    "eval": "evaluating",
    "done": "finished",
}
"""Phase name → words used in sentences."""

_RECORD_BYTES = 256
_HISTORY_STEPS = 128


@dataclass(frozen=True)
class ProgressRecord:
    """What one process last said: its pid, phase, step, count of changes, and Unix time (s)."""

    process_index: int
    pid: int
    phase: str
    step: int | None
    changes: int
    time: float


def progress_path(run_directory: str | os.PathLike[str], process_index: int) -> Path:
    """The file in which `process_index` reports."""
    return Path(run_directory) / f"progress-p{process_index}.txt"


class Progress:
    """Reports the phase of this process, and keeps how long each phase of the last steps took.

    Args:
      run_directory: local folder for the file, or None to keep times in memory only.
      process_index: this process.

    Example:
      >>> progress = Progress(None, process_index=0)
      >>> progress.phase("data", step=7)
      >>> progress.phase("dispatch", step=7)
      >>> progress.record.phase, progress.record.step
      ('dispatch', 7)
    """

    def __init__(self, run_directory: str | os.PathLike[str] | None, process_index: int):
        self.process_index = process_index
        self.path = None if run_directory is None else progress_path(run_directory, process_index)
        self._file: int | None = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._since = time.monotonic()
        self._times: deque[tuple[int, dict[str, float]]] = deque(maxlen=_HISTORY_STEPS)
        self.record = ProgressRecord(process_index, os.getpid(), "setup", None, 0, time.time())

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Report to the supervisor that started this process; in memory only if there is none."""
        return cls(
            environ.get(RUN_DIRECTORY_VARIABLE) or None,
            int(environ.get(PROCESS_INDEX_VARIABLE, "0")),
        )

    def phase(self, name: str, step: int | None = None) -> None:
        """Enter a phase. Call it *before* what may block.

        Args:
          name: one of `PHASES`.
          step: the step being worked on; None keeps the last one.
        """
        if name not in PHASES:
            raise ShardtrainError(f"unknown phase {name!r}: {suggest(name, PHASES)}")
        now = time.monotonic()
        last = self.record
        self._add_time(last.step, last.phase, now - self._since)
        self._since = now
        step = last.step if step is None else step
        self.record = ProgressRecord(
            self.process_index, last.pid, name, step, last.changes + 1, time.time()
        )
        if self._file is not None:
            os.pwrite(self._file, _encode(self.record), 0)

    @property
    def seconds_in_phase(self) -> float:
        """How long the current phase lasts already, in seconds."""
        return time.monotonic() - self._since

    def step_times(self) -> dict[int, dict[str, float]]:
        """Seconds per phase of the last completed steps: {step: {phase: seconds}}."""
        return {step: dict(times) for step, times in self._times if step != self.record.step}

    def close(self) -> None:
        """Close the file; the last record stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _add_time(self, step: int | None, phase: str, seconds: float) -> None:
        if step is None:
            return
        if not self._times or self._times[-1][0] != step:
            self._times.append((step, {}))
        times = self._times[-1][1]
        times[phase] = times.get(phase, 0.0) + seconds


def _encode(record: ProgressRecord) -> bytes:
    body = json.dumps(asdict(record), separators=(",", ":")).encode()
    body = body.ljust(_RECORD_BYTES - 10)
    return b"%08x " % zlib.crc32(body) + body + b"\n"


def write_record(run_directory: str | os.PathLike[str], record: ProgressRecord) -> None:
    """Write one record on behalf of a process that has not started to report."""
    progress_path(run_directory, record.process_index).write_bytes(_encode(record))


def read_progress(
    run_directory: str | os.PathLike[str], process_index: int, attempts: int = 5
) -> ProgressRecord | None:
    """Read what a process last reported; None if it never did.

    Raises:
      ShardtrainError: the file is damaged `attempts` times in a row.
    """
    path = progress_path(run_directory, process_index)
    for _ in range(attempts):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        checksum, _, body = content.rstrip(b"\n").partition(b" ")
        if len(content) == _RECORD_BYTES and checksum == b"%08x" % zlib.crc32(body):
            return ProgressRecord(**json.loads(body))
        time.sleep(0.001)
    raise ShardtrainError(f"progress file {path} is damaged ({len(content)} bytes)")
