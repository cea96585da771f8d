"""`shardtrain launch`: start n local processes, watch them, start all again after a failure.

Design. JAX cannot replace one process of a running group, so a failure of one ends all and a new
generation starts from the last saved step, with a new coordinator port. What a generation came to
and what follows is decided by pure functions in `outcome`; this file only acts.
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from shardtrain.errors import DistributedError, suggest
from shardtrain.launch.command import worker_command
from shardtrain.launch.generation import LaunchSettings, run_generation
from shardtrain.launch.gpus import visible_gpus
from shardtrain.launch.outcome import Generation, Restart, Stop, describe_exit, next_action
from shardtrain.launch.processes import Guardian
from shardtrain.launch.stop_request import StopRequest
from shardtrain.monitoring.hang import hang_timeouts as complete_timeouts

_MAX_DELAY_SECONDS = 10.0


def launch(
    command: Sequence[str],
    num_processes: int,
    devices_per_process: int | None = None,
    *,
    shrink_to: Sequence[int] = (),
    max_restarts: int = 3,
    hang_timeouts: Mapping[str, float | None] | float | None = None,
    run_directory: str | os.PathLike[str] | None = None,
    output: str = "all",
    grace_seconds: float = 3.0,
    stop_grace_seconds: float = 60.0,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Run `command` in `num_processes` local processes until it is done.

    Args:
      command: e.g. `["python", "train.py", "--lr", "0.1"]`; the script needs no change beyond
        calling `st.init_distributed()` first.
      num_processes: processes on this machine.
      devices_per_process: GPUs for each, or virtual CPU devices where there is no GPU. None: GPUs
        are divided evenly; on CPU JAX's default.
      shrink_to: smaller process counts that also work, used when one process does not come back.
      max_restarts: restarts without progress before giving up; progress refills the budget.
      hang_timeouts: seconds per phase without any report, see `monitoring.hang_timeouts`.
      run_directory: a local folder for logs, reports and stacks; None: a temporary one, removed
        when the run succeeds.
      output: "all" streams every process with a prefix `[p0] `, "first" only process 0 and
        without prefix (tables and progress bars stay intact), "none" only to the log files.
      grace_seconds: when a process leaves because it lost another one, the others have this long
        to report and leave too; a tenth of it once the process that failed by itself is known.
      stop_grace_seconds: after SIGTERM or Ctrl-C the workers have this long to save.
      environ: environment of the workers.

    Returns:
      0 done, 42 stopped by a signal with everything saved, 75 hang, 128 + signal, or the exit code
      of the process that failed first.

    Raises:
      DistributedError: the command or a number cannot be used; nothing was started.
    """
    settings = _settings(
        command, num_processes, devices_per_process, shrink_to, max_restarts, output,
        complete_timeouts(hang_timeouts), grace_seconds, stop_grace_seconds, environ,
    )  # fmt: skip
    directory = Path(run_directory or tempfile.mkdtemp(prefix="shardtrain-")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with Guardian() as guardian, StopRequest() as stop:
        code = _supervise(
            settings, num_processes, shrink_to, max_restarts, directory, guardian, stop
        )
    if run_directory is None and code == 0:
        shutil.rmtree(directory)
    return code


def _supervise(
    settings: LaunchSettings,
    process_count: int,
    shrink_to: Sequence[int],
    max_restarts: int,
    directory: Path,
    guardian: Guardian,
    stop: StopRequest,
) -> int:
    history: list[Generation] = []
    shown: set[str] = set()
    while True:
        folder = _next_folder(directory)
        _log_event(directory, "start", generation=folder.name, process_count=process_count)
        generation = run_generation(settings, process_count, folder, guardian, stop)
        history.append(generation)
        action = next_action(history, max_restarts=max_restarts, shrink_to=shrink_to)
        if generation.result == "failed":
            _explain(generation, folder, shown)
        _log_event(directory, "end", generation=folder.name, result=generation.result,
                   step=generation.step, exits=[asdict(e) for e in generation.exits],
                   action=str(action))  # fmt: skip
        if isinstance(action, Stop):
            if action.reason != "done":
                _say(f"{action.reason}; leaving with code {action.code}. Logs: {folder}")
            return action.code
        _say(_restarting(action, process_count))
        process_count = action.process_count
        _pause(history, stop)


def _settings(
    command: Sequence[str],
    num_processes: int,
    devices_per_process: int | None,
    shrink_to: Sequence[int],
    max_restarts: int,
    output: str,
    timeouts: Mapping[str, float | None],
    grace_seconds: float,
    stop_grace_seconds: float,
    environ: Mapping[str, str],
) -> LaunchSettings:
    """Everything that can be wrong is found here, before a process is started."""
    if os.name != "posix":
        raise DistributedError("shardtrain launch needs Linux, macOS or WSL")
    if num_processes < 1 or (devices_per_process is not None and devices_per_process < 1):
        raise DistributedError(
            f"{num_processes} processes x {devices_per_process} devices: both must be at least 1"
        )
    if bad := [n for n in shrink_to if not 0 < n < num_processes]:
        raise DistributedError(f"shrink_to={bad}: must be between 1 and {num_processes - 1}")
    if max_restarts < 0:
        raise DistributedError(f"max_restarts={max_restarts}: must be 0 or more")
    if output not in ("all", "first", "none"):
        raise DistributedError(f"output={output!r}: {suggest(output, ('all', 'first', 'none'))}")
    worker_command(command)
    return LaunchSettings(
        tuple(command), devices_per_process, timeouts, output, grace_seconds, stop_grace_seconds,
        environ, visible_gpus(environ),
    )  # fmt: skip


def _explain(generation: Generation, folder: Path, shown: set[str]) -> None:
    """Say what went wrong, with the traceback of the process that failed first, once.

    Args:
      shown: tracebacks printed so far; a new one is added.
    """
    root = generation.root
    if generation.hang is not None:
        _say(generation.hang)
    elif root is not None:
        path = folder / f"report-p{root.process_index}.json"
        report = json.loads(path.read_text()) if path.exists() else None
        _say(describe_exit(root, report, socket.gethostname()))
        if report is not None and report["traceback"] not in shown:
            shown.add(report["traceback"])
            sys.stderr.write(report["traceback"])
    others = generation.process_count - 1
    if others:
        plural = "process was" if others == 1 else "processes were"
        _say(f"{others} other {plural} stopped because of it")


def _restarting(action: Restart, before: int) -> str:
    count = action.process_count
    instead = f" instead of {before}" if count != before else ""
    noun = "process" if count == 1 else "processes"
    return f"restarting {count} {noun}{instead} from the last saved step ({action.reason})"


def _pause(history: Sequence[Generation], stop: StopRequest) -> None:
    """No pause after progress; else 0.5 s, 1 s, 2 s ... so that a broken run does not spin."""
    idle = 0
    for generation, before in zip(reversed(history), list(reversed(history))[1:], strict=False):
        if generation.step != before.step:
            break
        idle += 1
    until = time.monotonic() + (min(0.25 * 2**idle, _MAX_DELAY_SECONDS) if idle else 0.0)
    while time.monotonic() < until and not stop.signals:
        time.sleep(0.05)


def _next_folder(directory: Path) -> Path:
    """A new folder; earlier launches into the same run directory keep theirs."""
    number = 0
    while True:
        folder = directory / f"generation-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _log_event(directory: Path, event: str, **more: object) -> None:
    with (directory / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "event": event, **more}) + "\n")


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"shardtrain launch: {text}", file=sys.stderr, flush=True)
