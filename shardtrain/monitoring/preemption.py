"""Stop between two steps when asked to: SIGTERM from a scheduler, Ctrl-C from a person.

Design. With several processes every one must stop after the *same* step, or the last collective of
the late ones never completes. JAX's coordination service already solves that: it catches SIGTERM on
any process, tells all others, and agrees on one step. A Python SIGTERM handler would silently
replace its handler, so in distributed mode none is installed. One process alone needs no agreement:
a handler sets a flag.
"""

import os
import signal
import threading
import warnings
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

PREEMPTED_EXIT_CODE = 42
"""Exit code of a process that was asked to stop and saved everything first."""


class Preempted(SystemExit):
    """The run was asked to stop and has saved its state; leaves the interpreter with code 42.

    A `SystemExit`, so a plain script ends quietly and a supervisor reads the code.
    """

    def __init__(self, step: int | None = None):
        super().__init__(PREEMPTED_EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        return "preempted" if self.step is None else f"preempted; state saved at step {self.step}"


class Preemption:
    """Context manager that turns stop requests into `should_stop(step)`.

    Single process: SIGTERM and the first SIGINT (Ctrl-C) ask for a stop after the current step;
    the second SIGINT raises `KeyboardInterrupt` at once. Previous handlers come back on exit.
    Outside the main thread Python cannot install handlers: none is installed, a warning says so.

    Distributed (`jax.distributed` initialised): SIGTERM on any process makes all processes answer
    True at the same step. Every process must call `should_stop` at every step with equal steps.

    Args:
      distributed: overrides the detection by `jax.distributed.is_initialized()`.

    Attributes:
      reason: name of the signal that asked ("SIGTERM", "SIGINT"), or None.
      watching: whether stop requests can be noticed at all.

    Example:
      >>> with Preemption(distributed=False) as preemption:
      ...     [preemption.should_stop(step) for step in range(3)]
      [False, False, False]
    """

    def __init__(self, *, distributed: bool | None = None):
        self._distributed = distributed
        self._previous: dict[signal.Signals, Any] = {}
        self.reason: str | None = None
        self.watching = False

    def __enter__(self) -> Self:
        if self._distributed is None:
            self._distributed = jax.distributed.is_initialized()
        if self._distributed:
            self._warn_about_replaced_handler()
            self.watching = True
        elif threading.current_thread() is threading.main_thread():
            self._install()
        else:
            warnings.warn(
                "training runs outside the main thread, where Python cannot catch signals: SIGTERM "
                "and Ctrl-C will not stop it between steps. Call st.fit from the main thread.",
                stacklevel=2,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.watching = False
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave now that `step` is complete.

        Args:
          step: steps completed so far; in distributed mode equal on all processes.
        """
        if not self._distributed:
            return self.reason is not None
        if self.reason is None and multihost_utils.reached_preemption_sync_point(step):
            self.reason = "SIGTERM"
        return self.reason is not None

    def _install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.getsignal(number)
            # None: a C library owns the signal. SIG_IGN: the parent asked us to ignore it (nohup).
            if previous is None or previous is signal.SIG_IGN:
                continue
            self._previous[number] = previous
            signal.signal(number, self._on_signal)
        self.watching = bool(self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = name
        # os.write and not print: a handler may interrupt a print that holds the stream's lock.
        again = " (Ctrl-C again to interrupt at once)" if name == "SIGINT" else ""
        os.write(2, f"\n{name}: stopping after the current step{again}\n".encode())

    def _warn_about_replaced_handler(self) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        if callable(handler) and handler is not signal.default_int_handler:
            warnings.warn(
                f"a Python SIGTERM handler is installed ({handler!r}). If that happened after "
                "st.init_distributed(), it replaced the preemption notice of JAX and SIGTERM will "
                "not save the state. Install it before st.init_distributed(), or remove it.",
                stacklevel=3,
            )
