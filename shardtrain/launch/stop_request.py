"""SIGTERM and SIGINT to the supervisor become a list that its loop reads."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class StopRequest:
    """Context manager that collects stop signals; previous handlers come back on exit.

    Outside the main thread nothing can be collected and `signals` stays empty.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
