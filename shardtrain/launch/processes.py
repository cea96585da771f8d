"""One supervised process: start it in its own session, pump its output, end it for certain."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from shardtrain.launch import guardian


class Guardian:
    """Handle on the helper process that cleans up after a killed supervisor."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", guardian.__file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def add(self, pid: int) -> None:
        """Kill this process group if the supervisor goes away."""
        self._send(f"+{pid}\n")

    def remove(self, pid: int) -> None:
        """Forget this process group; it has ended."""
        self._send(f"-{pid}\n")

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # killed by somebody; workers are still ours
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class WorkerProcess:
    """One worker, leader of its own session and process group.

    Args:
      process_index: its index, used as the prefix of its output.
      command, environ: what to run.
      log: file that receives all output.
      prefix: put before each line on our stdout; None keeps the output in the log only.
    """

    def __init__(
        self,
        process_index: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        log: Path,
        prefix: str | None,
    ):
        self.process_index = process_index
        self._process = subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._pump = threading.Thread(
            target=_pump, args=(self._process.stdout, log, prefix), daemon=True
        )
        self._pump.start()

    @property
    def pid(self) -> int:
        """Process id, and id of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code (negative: signal), or None while it runs. Its children end with it."""
        code = self._process.poll()
        if code is not None:
            self._kill_group()
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the worker itself, not to its children."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> int:
        """End the worker and everything it started; returns its exit code."""
        self._kill_group()
        code = self._process.wait()
        self._kill_group()
        return code

    def finish_output(self) -> None:
        """Wait until everything it wrote has been passed on."""
        self._pump.join(timeout=5.0)

    def is_stopped(self) -> bool:
        """Whether the kernel holds the process (SIGSTOP or a tracer); False where unknown."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in ("T", "t")

    def _kill_group(self) -> None:
        # EPERM is what macOS answers for a group of which only zombies are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


_output_lock = threading.Lock()


def _pump(stream: BinaryIO, log: Path, prefix: str | None) -> None:
    with stream, log.open("ab", buffering=0) as file:
        for line in _lines(stream):
            file.write(line)
            if prefix is not None:
                text = prefix + line.decode(errors="replace")
                with _output_lock, contextlib.suppress(BrokenPipeError):
                    sys.stdout.write(text)
                    sys.stdout.flush()


def _lines(stream: BinaryIO):
    """Lines that end in newline or carriage return (progress bars), as soon as they arrive."""
    rest = b""
    while chunk := os.read(stream.fileno(), 65536):
        *complete, rest = (rest + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        yield from (line + b"\n" for line in complete)
    if rest:
        yield rest + b"\n"
