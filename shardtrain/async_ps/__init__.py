"""`st.async_ps`: a real asynchronous parameter server, for comparison and teaching.

Design: processes, not a program. Servers own arrays and apply every gradient the moment it comes;
workers pull, compute and push at their own speed. The parent's `Clock` hands out steps and bounds
how far ahead anyone runs. A step belongs to a worker until all servers have applied it, and a
server applies a step once: whoever dies, no batch is lost and none counts twice.
"""

import multiprocessing
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from shardtrain.async_ps.clock import Clock, Update
from shardtrain.async_ps.server import divide, run_server
from shardtrain.async_ps.wire import connect, serve
from shardtrain.async_ps.worker import AsyncJob, plan_of, run_worker
from shardtrain.errors import DistributedError, StrategyError
from shardtrain.pytree import leaves_by_path


@dataclass(frozen=True)
class AsyncResult:
    """What a run left.

    Args:
      params: Trained parameters, as in the model.
      updates: One entry per step, by step number.
      applied: Per server, the steps in the order in which it applied them.
    """

    params: Any
    updates: list[Update]
    applied: list[list[int]]


def async_ps(
    make_job: Callable[[], AsyncJob],
    num_steps: int,
    *,
    num_workers: int = 2,
    num_servers: int = 1,
    max_staleness: int = 4,
    delays: Sequence[float] = (),
) -> "AsyncRun":
    """Start servers and workers on this machine; the run goes on until `wait()`.

    Args:
      make_job: A function at the top level of an importable module: every process calls it. Under
        `if __name__ == "__main__":` in scripts, as for all of `multiprocessing`.
      num_steps: Steps in all, each with its own batch.
      num_workers: Processes that compute gradients.
      num_servers: Processes that own parameters.
      max_staleness: How many steps may be begun while an older one is unfinished (SSP).
      delays: Seconds added to every step of each worker, to try unequal machines.

    Returns:
      A context manager: `.wait()` gives the result, `.add_worker()` and `.kill(worker)` may be
      called meanwhile. Leaving it ends all processes.

    Raises:
      StrategyError: A number is out of range.
      ModelError: The model has variables besides its parameters.

    Example:
      with st.async_ps(make_job, 100, num_workers=4, num_servers=2) as run:
          result = run.wait()
    """
    for name, value, least in (
        ("num_steps", num_steps, 1),
        ("num_workers", num_workers, 1),
        ("num_servers", num_servers, 1),
        ("max_staleness", max_staleness, 0),
    ):
        if value < least:
            raise StrategyError(f"async_ps({name}={value}) is not a whole number >= {least}")
    run = AsyncRun(make_job, num_steps, max_staleness)
    try:
        run.start_servers(num_servers)
        for n in range(num_workers):
            run.add_worker(delays[n] if n < len(delays) else 0.0)
    except BaseException:
        run.__exit__()
        raise
    return run


class AsyncRun:
    """A run under way; made by `async_ps`."""

    def __init__(
        self,
        make_job: Callable[[], AsyncJob],
        num_steps: int,
        max_staleness: int,
    ):
        self._make_job, self._num_steps = make_job, num_steps
        self._context = multiprocessing.get_context("spawn")
        self._key = secrets.token_bytes(16)
        self._processes: list[Any] = []
        self._workers: list[Any] = []
        self._clock = Clock(num_steps, max_staleness)
        server, self._clock_address = serve("clock", self._clock, self._key)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._servers: list[tuple[tuple[str, int], list[str]]] = []

    def start_servers(self, count: int) -> None:
        """The servers, with the first parameters divided among them."""
        job = self._make_job()
        tree = plan_of(job).init(job.seed).params
        params = {path: np.asarray(x) for path, x in leaves_by_path(tree).items()}
        self._structure, self._order = jax.tree.structure(tree), list(params)
        owned = divide(params, count)
        started = [self._start_server({p: params[p] for p in paths}) for paths in owned]
        self._servers = [(_address(*s), paths) for s, paths in zip(started, owned, strict=True)]

    def add_worker(self, delay: float = 0.0) -> int:
        """A further worker, also in the middle of the run; its number."""
        worker = len(self._workers)
        arguments = (self._make_job, worker, self._clock_address, self._servers, delay, self._key)
        process = self._start(run_worker, arguments)
        self._workers.append(process)
        threading.Thread(target=self._watch, args=(worker, process), daemon=True).start()
        return worker

    def kill(self, worker: int) -> None:
        """End a worker as a crash would; its step goes to another."""
        self._workers[worker].kill()
        self._workers[worker].join()

    @property
    def progress(self) -> int:
        """Steps done."""
        return self._clock.progress()

    def wait(self) -> AsyncResult:
        """Until all steps are applied.

        Raises:
          DistributedError: All workers, or a server, ended before that.
        """
        for process in self._workers:  # grows while it is gone through, if workers join
            process.join()
        if self.progress < self._num_steps:
            codes = [p.exitcode for p in self._workers]
            raise DistributedError(
                f"async_ps: all workers ended after {self.progress} of {self._num_steps} steps "
                f"(exit codes {codes}); their output above says why"
            )
        shards = [connect("shard", address, self._key) for address, _ in self._servers]
        params: dict[str, Any] = {}
        for shard in shards:
            params |= shard.pull()[1]
        tree = self._structure.unflatten([params[path] for path in self._order])
        return AsyncResult(tree, self._clock.updates(), [shard.applied() for shard in shards])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _start_server(self, params: Any) -> tuple[Any, Any]:
        ready, theirs = self._context.Pipe(duplex=False)
        process = self._start(run_server, (self._make_job, params, self._key, theirs))
        theirs.close()
        return process, ready

    def _start(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        self._processes.append(process)
        return process

    def _watch(self, worker: int, process: Any) -> None:
        process.join()
        self._clock.lost(worker)


def _address(process: Any, ready: Any) -> tuple[str, int]:
    """Where a server listens, once it does."""
    try:
        return ready.recv()
    except EOFError as error:
        process.join()
        raise DistributedError(
            f"async_ps: a server ended with exit code {process.exitcode} before it was ready; "
            "its output above says why"
        ) from error


__all__ = ["AsyncJob", "AsyncResult", "AsyncRun", "Update", "async_ps"]
