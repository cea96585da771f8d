"""Inside a worker: how it starts, how it ends, and what it leaves behind for the supervisor.

Design. The launcher runs this file by its path, `python .../worker.py train.py --lr 0.1`, and the
file runs the user's script as `__main__`. That needs no change in the script (an environment
variable alone could not catch `sys.exit` or an import error), and this file uses the standard
library only, so stacks, exit codes and death with the parent work before JAX is even imported.

An exception must not end a worker the ordinary way: at interpreter exit JAX waits for all
processes, and those wait for this one. So the worker writes its report and leaves at once.
"""

import ctypes
import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

EXIT_LOCAL_ERROR = 1
EXIT_PEER_FAILURE = 17
EXIT_PREEMPTED = 42

SUPERVISOR_VARIABLE = "SHARDTRAIN_SUPERVISOR_PID"
RUN_DIRECTORY_VARIABLE = "SHARDTRAIN_RUN_DIRECTORY"  # as in monitoring.progress, tested equal
PROCESS_INDEX_VARIABLE = "SHARDTRAIN_PROCESS_INDEX"

# What the runtime says when another process went away (gloo, NCCL, the coordination service).
_PEER_WORDS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "unavailable",
    "heartbeat",
    "coordination service",
    "another task died",
)
_RUNTIME_ERRORS = ("JaxRuntimeError", "XlaRuntimeError", "BarrierTimeoutError")


def exit_code(error: BaseException) -> int:
    """The exit code that tells a supervisor what happened.

    0 done, 1 local error, 17 another process failed, 42 preempted with everything saved,
    130 interrupted from the keyboard; `SystemExit` keeps its own code.

    Example:
      >>> exit_code(ValueError("bad")), exit_code(SystemExit(3)), exit_code(SystemExit("bye"))
      (1, 3, 1)
    """
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return EXIT_LOCAL_ERROR
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return EXIT_PEER_FAILURE if is_peer_failure(error) else EXIT_LOCAL_ERROR


def is_peer_failure(error: BaseException) -> bool:
    """Whether the error, or what caused it, is a collective broken by another process."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = str(link).lower()
        if type(link).__name__ in _RUNTIME_ERRORS and any(word in text for word in _PEER_WORDS):
            return True
        link = link.__cause__ or link.__context__
    return False


def guard(main: Callable[[], object], environ: Mapping[str, str] = os.environ) -> None:
    """Run `main`; on any exception report, flush and leave the process at once with its code.

    Returns only when `main` succeeded (also by `sys.exit(0)`), so that the interpreter ends
    normally: then all processes meet in JAX's shutdown, which is right.

    Args:
      main: the program.
      environ: tells where the report goes (`report-p<index>.json`); without that the traceback
        goes to stderr.
    """
    try:
        main()
    except BaseException as error:  # noqa: BLE001 - everything must become an exit code
        _leave(error, environ)


def install_excepthook(environ: Mapping[str, str] = os.environ) -> None:
    """Give a process that was not started by our launcher the same ending as `guard`."""

    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> NoReturn:
        _leave(error, environ, hard=True)
        raise AssertionError("unreachable")

    sys.excepthook = hook


def _leave(error: BaseException, environ: Mapping[str, str], hard: bool = False) -> None:
    code = exit_code(error)
    error.__traceback__ = _user_part(error.__traceback__)
    if code == EXIT_PREEMPTED:
        _shut_down_jax()
    elif code != 0 and not _write_report(error, code, environ):
        traceback.print_exception(error)
    elif code == EXIT_PEER_FAILURE:
        print(f"stopping because another process failed: {_first_line(error)}", file=sys.stderr)
    if isinstance(error, SystemExit) and isinstance(error.code, str):
        print(error.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0 or hard:
        os._exit(code)


def _shut_down_jax() -> None:
    """All processes saved and leave together: without this barrier process 0, which holds the
    coordination service, could leave first and abort the others."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _write_report(error: BaseException, code: int, environ: Mapping[str, str]) -> bool:
    directory = environ.get(RUN_DIRECTORY_VARIABLE)
    if not directory:
        return False
    index = environ.get(PROCESS_INDEX_VARIABLE, "0")
    report = {
        "process_index": int(index),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "code": code,
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }
    path = Path(directory) / f"report-p{index}.json"
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(report))
        partial.replace(path)
    except OSError:
        return False
    return True


def _user_part(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the leading frames of this file and of runpy."""
    rest = trace
    while rest is not None and (
        rest.tb_frame.f_code.co_filename == __file__
        or rest.tb_frame.f_globals.get("__name__") == "runpy"
    ):
        rest = rest.tb_next
    return rest or trace


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# ----------------------------------------------------------------------- start of a worker


def die_with_parent(parent: int) -> None:
    """End this process when process `parent` ends: by the kernel on Linux, else by a thread."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(EXIT_LOCAL_ERROR)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(EXIT_LOCAL_ERROR)


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Everything that must work before the user's first import."""
    if parent := environ.get(SUPERVISOR_VARIABLE):
        die_with_parent(int(parent))
    faulthandler.enable()
    if directory := environ.get(RUN_DIRECTORY_VARIABLE):
        path = Path(directory) / f"stacks-p{environ.get(PROCESS_INDEX_VARIABLE, '0')}.txt"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


def run_command(arguments: Sequence[str]) -> None:
    """Run `script.py ...`, `-m module ...` or `-c code ...` as the main program."""
    head, *rest = arguments
    if head == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif head == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif head == "--exec":
        # Not Python: only die_with_parent applies (the kernel keeps it across exec).
        os.execvp(rest[0], rest)
    else:
        sys.argv = list(arguments)
        sys.path[0] = str(Path(head).resolve().parent)
        runpy.run_path(head, run_name="__main__")


if __name__ == "__main__":
    start()
    guard(lambda: run_command(sys.argv[1:]))
