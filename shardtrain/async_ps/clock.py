"""Who works on which step, and how far ahead anyone may run: the scheduler of the workers.

Stale synchronous parallel (Ho et al. 2013): a step is handed out only while the oldest unfinished
step is at most `max_staleness` behind it. The step of a worker that died is handed out again.
"""

import heapq
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Update:
    """One step that was applied.

    Args:
      step: Its number; decides its batch.
      worker: Who computed it.
      loss: At the parameters it was computed for.
      staleness: Updates of other steps that were applied between its pull and its push.
    """

    step: int
    worker: int
    loss: float
    staleness: int


class Clock:
    """Hands out steps `0 .. num_steps - 1`, each until it is done.

    Args:
      num_steps: Steps in all.
      max_staleness: Steps that may be begun while an older one is unfinished; 0: one at a time.

    Example:
      >>> clock = Clock(num_steps=2, max_staleness=0)
      >>> clock.next(worker=0)
      0
      >>> clock.lost(worker=0)
      >>> clock.next(worker=1)
      0
    """

    def __init__(self, num_steps: int, max_staleness: int):
        self._num_steps = num_steps
        self._max_staleness = max_staleness
        self._changed = threading.Condition()
        self._fresh = 0
        self._again: list[int] = []
        self._running: dict[int, int] = {}
        self._gone: set[int] = set()
        self._done: dict[int, Update] = {}

    def next(self, worker: int) -> int | None:
        """The next step for a worker, as soon as there is one; None when all is done."""
        with self._changed:
            while True:
                if worker in self._gone or len(self._done) == self._num_steps:
                    return None
                step = self._take()
                if step is not None:
                    self._running[worker] = step
                    return step
                self._changed.wait()

    def done(self, worker: int, step: int, loss: float, staleness: int) -> None:
        """A step was applied by all servers."""
        with self._changed:
            self._running.pop(worker, None)
            self._done[step] = Update(step, worker, loss, staleness)
            self._changed.notify_all()

    def lost(self, worker: int) -> None:
        """A worker has died: its step goes to another, and it gets no more."""
        with self._changed:
            self._gone.add(worker)
            step = self._running.pop(worker, None)
            if step is not None and step not in self._done:
                heapq.heappush(self._again, step)
            self._changed.notify_all()

    def progress(self) -> int:
        """Steps done."""
        with self._changed:
            return len(self._done)

    def updates(self) -> list[Update]:
        """What was applied, by step."""
        with self._changed:
            return [self._done[step] for step in sorted(self._done)]

    def _take(self) -> int | None:
        if self._again:
            return heapq.heappop(self._again)
        oldest = min(self._running.values(), default=self._fresh)
        if self._fresh < self._num_steps and self._fresh - oldest <= self._max_staleness:
            self._fresh += 1
            return self._fresh - 1
        return None
