"""The only file that knows Orbax: flat `{key: array}` into a directory and back.

Design: the free functions of Orbax's v1 API (seen on 0.12.8), not its `Checkpointer`. That class
decides by itself when to save and what to delete, skips saves below its latest step silently, and
raises the error of one save at the next. Steps, retention and errors are ours (see `checkpointer`);
Orbax writes the arrays of all processes, in parallel, and renames the directory when they are all
there. It is imported when something is written or read: that takes half as long as importing JAX.
"""

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".orbax-checkpoint-tmp"
"""What Orbax appends to the name of a directory that is not committed."""

ARRAYS = "state"
"""Name of the subdirectory that holds the arrays."""


class PendingSave:
    """A save whose arrays are on the host, being written by background threads."""

    def __init__(self, response: Any):
        self._response = response

    def result(self) -> None:
        """Wait for the commit on all processes; raises what went wrong."""
        self._response.result()


def save_async(directory: Path, arrays: Mapping[str, Any], timeout: int) -> PendingSave:
    """Begin to write `arrays` to the new directory; returns once they were copied to the host.

    Args:
        directory: must not exist; appears, complete, at the commit.
        arrays: jax arrays on any mesh, or numpy arrays; none of zero size.
        timeout: seconds after which a process gives up on the others.
    """
    ocp = _orbax()
    with _context(timeout=timeout):
        response = ocp.save_async(str(directory), dict(arrays), checkpointable_name=ARRAYS)
    return PendingSave(response)


def load(directory: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arrays named in `targets`, and only those.

    Args:
        directory: a committed step.
        targets: `jax.ShapeDtypeStruct` with a sharding → a jax array there; numpy array → numpy.
    """
    if not targets:
        return {}
    ocp = _orbax()
    with _context(partial=True):
        return ocp.load(str(directory), dict(targets), checkpointable_name=ARRAYS)


def _orbax() -> Any:
    from orbax.checkpoint import v1

    return v1


def _context(timeout: int = 300, partial: bool = False) -> Any:
    context = _orbax().Context()
    context.asynchronous.timeout_secs = timeout
    # float weights shrink by a few percent only, for three times the time
    context.array.saving.use_compression = False
    # shardings always come from the current plan, never from the file
    context.array.saving.enable_write_sharding_file = False
    context.pytree.loading.partial_load = partial
    return context


class _NoOrbax(logging.Filter):
    """Drops the log records of Orbax: its errors reach the user as exceptions of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


_NO_ORBAX = _NoOrbax()


def silence_logs() -> None:
    """Keep Orbax's progress and error records off the console; adding it twice does nothing."""
    logging.getLogger("absl").addFilter(_NO_ORBAX)


def can_finish_at_exit() -> bool:
    """Whether Orbax can still finish a save while the interpreter ends.

    It needs to start threads for that. Python 3.12 refuses to as soon as the main program is over
    (3.11 and 3.13 do not).
    """
    return sys.version_info[:2] != (3, 12) and hasattr(threading, "_register_atexit")


def before_threads_stop(callback: Callable[[], None]) -> None:
    """Run `callback` when the interpreter ends, while background threads still can work.

    `atexit` is too late: by then `concurrent.futures` refuses new work and a save in flight dies.
    `threading._register_atexit` is private; seen in Python 3.9 to 3.14.
    """
    _orbax()  # callbacks run last registered first: ours must come after what Orbax registers
    register = getattr(threading, "_register_atexit", atexit.register)
    register(callback)
