"""What is started for one worker: its command line and its environment."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardtrain.errors import DistributedError
from shardtrain.launch import worker
from shardtrain.launch.environment import (
    COORDINATOR_VARIABLE,
    DEVICES_VARIABLE,
    PROCESS_COUNT_VARIABLE,
)
from shardtrain.launch.gpus import gpu_share

_PYTHON = re.compile(r"python(\d(\.\d+)?)?t?(\.exe)?$")


def worker_command(command: Sequence[str]) -> list[str]:
    """Put our worker entry between the interpreter and the user's program.

    Args:
      command: `["python", "train.py", ...]`, a script with a Python shebang (console scripts), a
        bare `train.py`, or any other program, which is run as it is.

    Example:
      >>> worker_command(["python3", "-X", "dev", "train.py", "--lr=1"])[1:3]
      ['-X', 'dev']
    """
    if not command:
        raise DistributedError("nothing to launch: shardtrain launch -n 2 -- python train.py")
    program, *rest = command
    entry = worker.__file__
    if program.endswith(".py"):
        return [sys.executable, entry, *command]
    path = shutil.which(program)
    if path is None:
        raise DistributedError(f"cannot launch {program!r}: not found on PATH")
    if _PYTHON.search(Path(path).name):
        options = _interpreter_options(rest)
        return [path, *rest[:options], entry, *rest[options:]]
    if shebang := _python_shebang(path):
        return [shebang, entry, path, *rest]
    return [sys.executable, entry, "--exec", path, *rest]


def _interpreter_options(arguments: Sequence[str]) -> int:
    """How many leading arguments belong to the interpreter, not to the program."""
    count = 0
    while count < len(arguments) and arguments[count].startswith("-"):
        if arguments[count] in ("-m", "-c", "-"):
            break
        count += 2 if arguments[count] in ("-X", "-W", "--check-hash-based-pycs") else 1
    if count >= len(arguments) or arguments[count] == "-":
        raise DistributedError("cannot launch python without a program: python train.py")
    return count


def _python_shebang(path: str) -> str | None:
    with open(path, "rb") as file:
        first = file.readline(256)
    words = first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
    return words[0] if len(words) == 1 and _PYTHON.search(words[0]) else None


def worker_environment(
    environ: Mapping[str, str],
    *,
    process_index: int,
    process_count: int,
    devices_per_process: int | None,
    coordinator: str,
    run_directory: Path,
    gpus: Sequence[str],
) -> dict[str, str]:
    """The environment of one worker.

    Args:
      environ: what the launcher itself was given; passed on.
      gpus: identifiers of the visible GPUs, divided among the processes; empty means CPU devices.

    Raises:
      DistributedError: the GPUs do not divide among the processes.
    """
    variables = {
        **environ,
        worker.PROCESS_INDEX_VARIABLE: str(process_index),
        PROCESS_COUNT_VARIABLE: str(process_count),
        COORDINATOR_VARIABLE: coordinator,
        worker.RUN_DIRECTORY_VARIABLE: str(run_directory),
        worker.SUPERVISOR_VARIABLE: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
    }
    if any(name.lower() in ("http_proxy", "https_proxy", "grpc_proxy") for name in environ):
        # The coordination service speaks gRPC, which would send even loopback through a proxy.
        direct = [environ.get("no_proxy", ""), "127.0.0.1", "localhost"]
        variables["no_proxy"] = ",".join(filter(None, direct))
    variables.pop(DEVICES_VARIABLE, None)
    if gpus:
        mine = gpu_share(gpus, process_index, process_count, devices_per_process)
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        variables[DEVICES_VARIABLE] = str(len(mine))
    elif devices_per_process:
        variables["JAX_NUM_CPU_DEVICES"] = str(devices_per_process)
        variables.setdefault("NPROC", str(8 * int(devices_per_process)))  # as `st.simulate` does
        variables.setdefault("JAX_PLATFORMS", "cpu")
        variables[DEVICES_VARIABLE] = str(devices_per_process)
    return variables


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
