"""The training loop, readable top to bottom."""

import collections
import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardtrain.checkpoint import Checkpointer
from shardtrain.data import DataLoader, audit_first_batch
from shardtrain.errors import DataError
from shardtrain.modules import Mean
from shardtrain.monitoring import (
    Preempted,
    Preemption,
    Progress,
    Watchdog,
    check_agreement,
    find_stragglers,
    gather_step_times,
)
from shardtrain.monitoring.callbacks import Callback, RunInfo
from shardtrain.monitoring.console import ConsoleProgress
from shardtrain.monitoring.metrics_log import MetricsLog
from shardtrain.plan import Plan
from shardtrain.train import TrainState

STRAGGLER_EVERY = 100
"""Steps between two looks for a process that holds up the others."""


@dataclass
class FitResult:
    """What a run left.

    Args:
      state: The last state.
      history: One dict of host floats per step of this call (`step`, `loss`, `grad_norm`, ...).
      evals: One dict per evaluation.
      stopped: None if all steps were done, else the signal that stopped it ("SIGINT").
      directory: The run directory, or None.
    """

    state: TrainState
    history: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None
    directory: Path | None = None

    def __repr__(self) -> str:
        last = self.history[-1] if self.history else {}
        shown = ", ".join(f"{k}={v:.4g}" for k, v in last.items())
        stopped = f", stopped by {self.stopped}" if self.stopped else ""
        return f"FitResult({shown or 'no step was left to do'}{stopped})"


def fit(
    plan: Plan,
    loader: DataLoader,
    num_steps: int,
    directory: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    seed: int = 0,
    state: TrainState | None = None,
    eval_loader: DataLoader | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    max_to_keep: int | None = 3,
    progress: bool = True,
) -> FitResult:
    """Train until `num_steps` optimizer steps are done; resumes by itself from `directory`.

    The loop can be run again (a notebook cell, a restarted job): it continues after the newest
    verified checkpoint, with the batches an uninterrupted run would have seen. Ctrl-C stops after
    the current step, saves and returns; SIGTERM saves and exits with code 42.

    Args:
      plan: From `st.plan`.
      loader: Global batches by step.
      num_steps: Total steps, those before a resume included.
      directory: Checkpoints and `metrics.jsonl` go here; None keeps everything in memory.
      callbacks: See `Callback`.
      seed: Of the first state, if there is no checkpoint and no `state`.
      state: Start from this state instead (it is donated). A checkpoint goes before it.
      eval_loader: Held-out data, gone through once per evaluation.
      eval_every: Steps between evaluations; None: only at the end.
      save_every: Steps between checkpoints; None: only at the end (or when stopped).
      max_to_keep: Checkpoints kept.
      progress: Show a progress bar (plain lines where there is no terminal).

    Raises:
      DataError: The loader's batches are not what the plan was made for, or not those of the run
        that is resumed.
      RestoreMismatch: `directory` belongs to another model. Nothing is overwritten.

    Example:
      >>> import flax.nnx as nnx, optax, shardtrain as st
      >>> data = st.DataLoader({"x": np.ones((64, 4), "f"), "y": np.zeros((64,), "i")}, 16)
      >>> loss = lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"])
      >>> plan = st.plan(lambda rngs: nnx.Linear(4, 2, rngs=rngs), loss, optax.sgd(1.0),
      ...                data.abstract_batch)
      >>> st.fit(plan, data, num_steps=3, progress=False).history[-1]["loss"] < 0.7
      True
    """
    _check_loader(plan, loader)
    path = Path(directory).expanduser().resolve() if directory is not None else None
    is_main = jax.process_index() == 0
    listeners = [*callbacks]
    if progress and is_main:
        listeners.append(ConsoleProgress())
    report = Progress.from_environment()
    checkpoints = _Checkpoints(path, plan, loader, max_to_keep)
    report.phase("restore")
    state, resumed = checkpoints.restore_or(lambda: plan.init(seed) if state is None else state)
    result = FitResult(state=state, directory=path)
    if path is not None and is_main:
        listeners.append(MetricsLog(path / "metrics.jsonl"))
    first = int(state.step)
    run = RunInfo(plan, first, num_steps, path, loader.global_batch_size, _tokens(plan), is_main)
    _tell(listeners, "on_start", run)
    if resumed and is_main and progress:
        print(resumed)

    shardings = plan.layout.batch_shardings
    pending: collections.deque[_Pending] = collections.deque()
    with (
        _ending(listeners, result, loader, report),
        checkpoints,
        Preemption() as stop,
        _watchdog(report),
    ):
        _agree(plan, loader, num_steps)
        for step in range(first, num_steps):
            report.phase("data", step)
            started = time.perf_counter()
            batch = loader.batch(step, shardings)
            ready = time.perf_counter()
            if step == first:
                audit_first_batch(batch)
            report.phase("first_step" if step == first else "dispatch", step)
            result.state, metrics = plan.step(result.state, batch)
            pending.append(_Pending(step + 1, metrics, started, ready))
            done = step + 1
            # Read the step before: the device works on this one meanwhile.
            report.phase("wait", step)
            while len(pending) > 1:
                _record(pending.popleft(), result, listeners)
            checkpoints.poll()
            stopping = stop.should_stop(done)
            between = done < num_steps and not stopping
            if _due(done, STRAGGLER_EVERY):
                _report_stragglers(report, is_main)
            if between and eval_loader is not None and _due(done, eval_every):
                report.phase("eval", step)
                _drain(pending, result, listeners)
                _evaluate(plan, result, eval_loader, done, listeners)
            if between and _due(done, save_every):
                report.phase("ckpt", step)
                checkpoints.save(result.state)
                _tell(listeners, "on_checkpoint", done)
            if stopping:
                result.stopped = stop.reason
                break
        report.phase("wait")
        _drain(pending, result, listeners)
        done = int(result.state.step)
        if eval_loader is not None and result.stopped is None and done > first:
            report.phase("eval")
            _evaluate(plan, result, eval_loader, done, listeners)
        report.phase("ckpt")
        if done > first:
            checkpoints.save(result.state)
            _tell(listeners, "on_checkpoint", done)
        checkpoints.wait()
        report.phase("done")
    _tell(listeners, "on_end", result)
    if result.stopped == "SIGTERM":
        raise Preempted(int(result.state.step))
    return result


def evaluate(plan: Plan, state: TrainState, loader: DataLoader) -> dict[str, float]:
    """Metrics over one pass of a loader, every example counted once.

    The last batch is filled up to its static shape with rows of weight 0.

    Returns:
      Name -> value, `weight` included.
    """
    sums: dict[str, Mean] = {}
    for batch, rows in loader.eval_batches(plan.layout.batch_shardings):
        # One batch at a time: nothing orders two evaluations, and on CPU the collectives of several
        # can wait for each other for ever.
        means = jax.block_until_ready(plan.eval_means(state, batch, rows))
        for name, mean in means.items():
            sums[name] = jax.block_until_ready(sums[name] + mean) if name in sums else mean
    values = {name: float(mean.value) for name, mean in sums.items()}
    return {**values, "weight": float(sums["loss"].weight)}


@contextlib.contextmanager
def _ending(
    listeners: Sequence[Callback], result: FitResult, loader: DataLoader, report: Progress
) -> Generator[None]:
    """However the loop ends: callbacks hear of it, threads and files are closed."""
    try:
        yield
    except BaseException:
        _tell(listeners, "on_end", result)
        raise
    finally:
        loader.close()
        report.close()


def _watchdog(report: Progress) -> Any:
    """Several processes: one that hangs must end, or all the others wait for ever."""
    return Watchdog(report) if jax.process_count() > 1 else contextlib.nullcontext()


def _agree(plan: Plan, loader: DataLoader, num_steps: int) -> None:
    """Several processes: all run the same thing, or say who does not, before the first step."""
    if jax.process_count() == 1:
        return
    facts = {"jax": jax.__version__, "num_steps": str(num_steps), **plan.describe()}
    facts |= {f"data {k}": v for k, v in loader.describe().items()}
    check_agreement({k: str(v) for k, v in facts.items()})


def _report_stragglers(report: Progress, is_main: bool) -> None:
    if jax.process_count() > 1:
        for straggler in find_stragglers(gather_step_times(report.step_times())):
            if is_main:
                print(straggler)


@dataclass(frozen=True)
class _Pending:
    """A dispatched step whose metrics have not been read yet."""

    step: int
    metrics: Mapping[str, jax.Array]
    started: float
    ready: float


class _Checkpoints:
    """The run's checkpoints, or nothing when it has no directory; a context manager."""

    def __init__(self, path: Path | None, plan: Plan, loader: DataLoader, max_to_keep: int | None):
        self._loader = loader
        self._store = None if path is None else Checkpointer(path, plan, max_to_keep=max_to_keep)

    def __enter__(self) -> "_Checkpoints":
        if self._store is not None:
            self._store.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Waits for what is being saved; after an error, not for the other processes."""
        if self._store is not None:
            self._store.__exit__(kind, error, traceback)

    def restore_or(self, make: Callable[[], TrainState]) -> tuple[TrainState, str]:
        """The newest good state, else a new one; and a sentence when it was restored."""
        if self._store is None or self._store.latest() is None:
            return make(), ""
        state = self._store.restore()
        self._loader.check_resume(self._store.extra.get("data", {}))
        step = int(state.step)
        example = step * self._loader.global_batch_size
        return state, (
            f"resumed at step {step}: next example {example % self._loader.examples_per_epoch} of "
            f"epoch {self._loader.epoch(step)}, same as the uninterrupted run"
        )

    def save(self, state: TrainState) -> None:
        """Start to save; returns when the state is copied."""
        if self._store is not None:
            self._store.save(state, extra={"data": self._loader.describe()})

    def poll(self) -> None:
        """Raise at once if a save in the background has failed."""
        if self._store is not None:
            self._store.poll()

    def wait(self) -> None:
        """Until everything is committed."""
        if self._store is not None:
            self._store.wait()


def _record(item: _Pending, result: FitResult, listeners: Sequence[Callback]) -> None:
    values = {name: float(np.asarray(value)) for name, value in item.metrics.items()}
    now = time.perf_counter()
    values["seconds"] = now - item.started
    values["data_seconds"] = item.ready - item.started
    result.history.append({"step": item.step, **values})
    _tell(listeners, "on_step", item.step, values)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _drain(pending: Any, result: FitResult, listeners: Sequence[Callback]) -> None:
    while pending:
        _record(pending.popleft(), result, listeners)


def _evaluate(
    plan: Plan, result: FitResult, loader: DataLoader, step: int, listeners: Sequence[Callback]
) -> None:
    values = evaluate(plan, result.state, loader)
    result.evals.append({"step": step, **values})
    _tell(listeners, "on_eval", step, values)


def _tell(listeners: Sequence[Callback], event: str, *args: Any) -> None:
    """Call an event on all who listen to it; a callback need not have every method."""
    for listener in listeners:
        method = getattr(listener, event, None)
        if method is not None:
            method(*args)


def _check_loader(plan: Plan, loader: DataLoader) -> None:
    if not hasattr(loader, "abstract_batch"):
        raise DataError(
            f"loader is a {type(loader).__name__}; st.fit needs an st.DataLoader (global batch = "
            "f(seed, step)), so that it can resume exactly"
        )
    wanted = jax.tree.map(lambda x: (x.shape, str(x.dtype)), plan.layout.batch)
    given = jax.tree.map(lambda x: (x.shape, str(x.dtype)), loader.abstract_batch)
    if wanted != given:
        raise DataError(
            f"the loader's batches are {given}, the plan was made for {wanted}. Plan with "
            "loader.abstract_batch"
        )


def _tokens(plan: Plan) -> int | None:
    """Positions per step, where a batch looks like token sequences."""
    sizes = [
        leaf.size
        for leaf in jax.tree.leaves(plan.layout.batch)
        if leaf.ndim == 2 and np.issubdtype(leaf.dtype, np.integer)
    ]
    return max(sizes, default=None)
