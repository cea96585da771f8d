"""Run all processes once, until all have ended or the first failure has ended them.

Invariants: a generation never outlives its first failed worker by more than the grace time, and
when `run_generation` returns or raises, nothing it started is alive.
"""

import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardtrain.launch.command import free_port, worker_command, worker_environment
from shardtrain.launch.outcome import Exit, Generation
from shardtrain.launch.processes import Guardian, WorkerProcess
from shardtrain.launch.stop_request import StopRequest
from shardtrain.monitoring.hang import (
    Hang,
    ProcessStatus,
    describe_hang,
    describe_lost,
    find_hang,
)
from shardtrain.monitoring.progress import ProgressRecord, read_progress, write_record

_POLL_SECONDS = 0.05
_HANG_LOOK_SECONDS = 0.2
_STACKS_SECONDS = 2.0
_ROOT_SHARE = 0.1


@dataclass(frozen=True)
class LaunchSettings:
    """What does not change from one generation to the next. See `supervisor.launch`."""

    command: tuple[str, ...]
    devices_per_process: int | None
    hang_timeouts: Mapping[str, float | None]
    output: str
    grace_seconds: float
    stop_grace_seconds: float
    environ: Mapping[str, str]
    gpus: tuple[str, ...]


def run_generation(
    settings: LaunchSettings,
    process_count: int,
    directory: Path,
    guardian: Guardian,
    stop: StopRequest,
) -> Generation:
    """Start `process_count` workers, watch them, and return how it ended.

    Args:
      directory: existing folder for progress, reports, stacks and logs of this generation.
      guardian: cleans up if this process is killed meanwhile.
      stop: whether somebody asked us to stop.
    """
    workers: list[WorkerProcess] = []
    try:
        coordinator = f"127.0.0.1:{free_port()}"
        for index in range(process_count):
            workers.append(_start(settings, index, process_count, coordinator, directory))
            guardian.add(workers[-1].pid)
        return _Watch(settings, workers, directory, stop).run()
    finally:
        for worker in workers:
            worker.kill()
            worker.finish_output()
            guardian.remove(worker.pid)


def _start(
    settings: LaunchSettings, index: int, count: int, coordinator: str, directory: Path
) -> WorkerProcess:
    environ = worker_environment(
        settings.environ,
        process_index=index,
        process_count=count,
        devices_per_process=settings.devices_per_process,
        coordinator=coordinator,
        run_directory=directory,
        gpus=settings.gpus,
    )
    write_record(directory, ProgressRecord(index, 0, "import", None, 0, time.time()))
    prefixes = {"all": f"[p{index}] ", "first": "" if index == 0 else None, "none": None}
    log = directory / f"log-p{index}.txt"
    command = worker_command(settings.command)
    return WorkerProcess(index, command, environ, log, prefixes[settings.output])


class _Watch:
    """The loop over one generation."""

    def __init__(
        self,
        settings: LaunchSettings,
        workers: Sequence[WorkerProcess],
        directory: Path,
        stop: StopRequest,
    ):
        self._settings = settings
        self._running = list(workers)
        self._count = len(workers)
        self._directory = directory
        self._stop = stop
        self._exits: list[Exit] = []
        self._seen: dict[int, tuple[ProgressRecord, float]] = {}
        self._deadline = float("inf")

    def run(self) -> Generation:
        hang, lost, next_look, forwarded = None, None, 0.0, False
        while self._running and hang is None:
            self._reap()
            now = time.monotonic()
            if self._stop.signals and not forwarded:
                forwarded = True
                self._deadline = now + self._settings.stop_grace_seconds
                for worker in self._running:
                    worker.send(signal.SIGTERM)
            if now >= self._deadline or len(self._stop.signals) > 1:
                lost = self._left_behind()
                break
            if now >= next_look:
                next_look = now + _HANG_LOOK_SECONDS
                hang = find_hang(self._statuses(), self._settings.hang_timeouts)
            if self._running and hang is None:
                time.sleep(_POLL_SECONDS)
        if lost is not None:
            return self._finish(lost, describe_lost(lost, self._dump_stacks()))
        if hang is not None:
            return self._finish(hang, describe_hang(hang, self._dump_stacks()))
        return self._finish(None, None)

    def _reap(self) -> None:
        for worker in list(self._running):
            code = worker.poll()
            if code is None:
                continue
            self._running.remove(worker)
            record = self._record(worker)
            exit_ = Exit(worker.process_index, code, record.phase, record.step, time.time())
            self._exits.append(exit_)
            # Ended by the SIGTERM we passed on: that must not cut short those that are saving.
            ended_by_us = self._stop.signals and code == -signal.SIGTERM
            if exit_.kind not in ("done", "preempted") and not ended_by_us:
                self._deadline = min(self._deadline, time.monotonic() + self._grace())

    def _grace(self) -> float:
        """Followers may be seen before the process they lost; after that nothing is to be learnt.

        The others can do nothing useful any more: some of them notice at once, others wait in a
        collective for ever (both happen with gloo).
        """
        follower = self._exits[-1].kind == "peer"
        return self._settings.grace_seconds * (1.0 if follower else _ROOT_SHARE)

    def _record(self, worker: WorkerProcess) -> ProgressRecord:
        record = read_progress(self._directory, worker.process_index)
        assert record is not None, "written before the worker was started"
        return record

    def _statuses(self) -> list[ProcessStatus]:
        """Ages by our own clock, since the last change we saw: clocks need not agree."""
        now, rows = time.monotonic(), []
        for worker in self._running:
            record, index = self._record(worker), worker.process_index
            if index not in self._seen or self._seen[index][0] != record:
                self._seen[index] = (record, now)
            age = now - self._seen[index][1]
            rows.append(
                ProcessStatus(
                    index, record.phase, record.step, age, worker.pid,
                    host=socket.gethostname(), stopped=worker.is_stopped(),
                )
            )  # fmt: skip
        return rows

    def _left_behind(self) -> Hang | None:
        """Everybody else lost contact and left: who is still here is the one they lost."""
        if self._stop.signals or any(e.kind != "peer" for e in self._exits):
            return None
        rows = tuple(self._statuses())
        return Hang(rows, rows)

    def _finish(self, hang: Hang | None, sentence: str | None) -> Generation:
        culprits = () if hang is None else hang.culprits
        records = [read_progress(self._directory, index) for index in range(self._count)]
        steps = [r.step for r in records if r is not None and r.step is not None]
        return Generation(
            self._count,
            tuple(self._exits),
            step=max(steps, default=None),
            hang=sentence,
            hang_process=culprits[0].process_index if culprits else None,
            stop_signal=self._stop.signals[0] if self._stop.signals else None,
        )

    def _dump_stacks(self) -> str:
        """Ask every process for its stacks; stopped ones cannot answer."""
        waiting = {w.process_index: self._stacks_size(w) for w in self._running}
        for worker in self._running:
            worker.send(signal.SIGUSR1)
        until = time.monotonic() + _STACKS_SECONDS
        while waiting and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            for worker in self._running:
                index = worker.process_index
                if index in waiting and self._stacks_size(worker) > waiting[index]:
                    del waiting[index]
        silent = "".join(f" (process {index} did not answer)" for index in waiting)
        return f"{self._directory}/stacks-p*.txt{silent}"

    def _stacks_size(self, worker: WorkerProcess) -> int:
        path = self._directory / f"stacks-p{worker.process_index}.txt"
        return path.stat().st_size if path.exists() else 0
