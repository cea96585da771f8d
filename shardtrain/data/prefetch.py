"""Reading ahead: while step s computes, a thread reads the batches of s+1, s+2, ..."""

import concurrent.futures
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs `read(step)` in one background thread, ahead of a caller who goes step by step.

    The result of `get(step)` is that of `read(step)`, whatever the order of calls: `read` must be a
    pure function of the step. Only sequential access (s, s+1) reads ahead, at most `depth` batches,
    so memory is bounded and random access costs nothing extra. Reads never overlap.

    Args:
        read: step → batch.
        depth: how many batches to hold ready; at least 1.
    """

    def __init__(self, read: Callable[[int], T], depth: int):
        self._read = read
        self._depth = depth
        self._pending: dict[int, concurrent.futures.Future[T]] = {}
        self._previous: int | None = None
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    def get(self, step: int) -> T:
        """The batch of `step`; an error of `read` is raised here, for the step it belongs to."""
        executor = self._running()
        sequential = self._previous is not None and step == self._previous + 1
        if not sequential:
            self._drop_pending()
        self._previous = step
        future = self._pending.pop(step, None) or executor.submit(self._read, step)
        if sequential:
            for ahead in range(step + 1, step + 1 + self._depth):
                if ahead not in self._pending:
                    self._pending[ahead] = executor.submit(self._read, ahead)
        return future.result()

    def close(self) -> None:
        """Stop the thread after the read in flight. A later `get` starts a new one."""
        self._drop_pending()
        self._previous = None
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _running(self) -> concurrent.futures.ThreadPoolExecutor:
        if self._executor is None:
            executor = concurrent.futures.ThreadPoolExecutor(1, "shardtrain-data")
            # a loader that is simply dropped (a re-run notebook cell) must not leave a thread
            weakref.finalize(self, executor.shutdown, wait=False, cancel_futures=True)
            self._executor = executor
        return self._executor

    def _drop_pending(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()
