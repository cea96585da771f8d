"""Second line of defence against hangs, inside each process: a thread that ends the process.

The supervisor is the first line. Where there is none (SLURM, Kubernetes), or where it was itself
lost, a stuck process notices by its own clock, writes its stacks and leaves with code 75, so that
whoever started it can start it again. Python threads run while the main thread is blocked in XLA.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from shardtrain.monitoring.hang import Hang, ProcessStatus, describe_hang, hang_timeouts
from shardtrain.monitoring.progress import Progress

WATCHDOG_EXIT_CODE = 75
"""Exit code of a process that found itself stuck."""


def enable_stack_dumps(path: str | os.PathLike[str]) -> bool:
    """From now on SIGUSR1 appends the stacks of all threads to `path`.

    Returns:
      False where the platform has no SIGUSR1 (Windows); nothing is registered then.
    """
    if not hasattr(faulthandler, "register"):
        return False
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # The file must stay open as long as the process lives: faulthandler keeps its descriptor.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)
    return True


class Watchdog:
    """Context manager that ends the process when its progress stops.

    Args:
      progress: the report of this process.
      timeouts: seconds per phase, see `hang_timeouts`; all are stretched by `patience`, so that a
        supervisor, which sees all processes and knows the culprit, acts first.
      patience: factor on every limit.
      on_hang: called with the report; the default prints it with all stacks and exits with 75.
      interval: seconds between two looks.

    Example:
      >>> with Watchdog(Progress(None, 0), timeouts={"wait": 60.0}):
      ...     pass
    """

    def __init__(
        self,
        progress: Progress,
        timeouts: Mapping[str, float | None] | float | None = None,
        *,
        patience: float = 1.5,
        on_hang: Callable[[str], None] | None = None,
        interval: float = 1.0,
    ):
        self._progress = progress
        self._timeouts = hang_timeouts(timeouts)
        self._patience = patience
        self._on_hang = on_hang or _dump_and_exit
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            record = self._progress.record
            age = self._progress.seconds_in_phase
            limit = self._timeouts[record.phase]
            # Looked up twice: the phase may have changed between the two lines above.
            if limit is None or age <= limit * self._patience or record != self._progress.record:
                continue
            status = ProcessStatus(record.process_index, record.phase, record.step, age, record.pid)
            self._on_hang("Watchdog: " + describe_hang(Hang((status,), (status,))))
            return


def _dump_and_exit(report: str) -> None:
    sys.stderr.write(f"{report} Leaving with code {WATCHDOG_EXIT_CODE}.\n")
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(WATCHDOG_EXIT_CODE)
