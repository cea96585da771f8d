"""Kills what a supervisor leaves behind when it is itself killed.

A tiny process in its own session, standard library only. It reads `+pid` and `-pid` lines from a
pipe whose other end only the supervisor holds. When the pipe ends, however the supervisor ended, it
kills the process groups that were added and not removed. Unlike a thread inside a worker it also
ends workers that are stopped or stuck, and their children.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Read until the supervisor is gone, then kill what is left."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: dict[int, None] = {}
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            groups[pid] = None
        else:
            groups.pop(pid, None)
    for pid in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
