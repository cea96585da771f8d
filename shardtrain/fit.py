"""The training loop, readable top to bottom."""

import collections
import contextlib
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardtrain.algorithms import DiLoCo, Gossip, LocalSGD
from shardtrain.checkpoint import has_replicas, replica_divergence
from shardtrain.data import DataLoader, audit_first_batch
from shardtrain.errors import DataError, ReplicaDivergenceError
from shardtrain.explore.oracle import StepOracle
from shardtrain.modules import Mean
from shardtrain.monitoring import (
    Preempted,
    Preemption,
    Progress,
    Watchdog,
    find_stragglers,
    gather_step_times,
)
from shardtrain.monitoring.bad_steps import BadStep
from shardtrain.monitoring.callbacks import Callback, RunInfo
from shardtrain.monitoring.console import ConsoleProgress
from shardtrain.monitoring.guard import LossGuard
from shardtrain.monitoring.metrics_log import MetricsLog
from shardtrain.plan import Plan
from shardtrain.recovery import LossWatch, SavedStates, check_first_batch, check_run, skip_step
from shardtrain.train import TrainState

STRAGGLER_EVERY = 100
"""Steps between two looks for a process that holds up the others."""

DEFAULT_GUARD = LossGuard()


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
    snapshot_every: int | None = None,
    guard: LossGuard | None = DEFAULT_GUARD,
    skip_steps: Collection[int] = (),
    check_replicas_every: int | None = 1000,
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
      snapshot_every: Steps between copies of the state in host memory, here and at the next
        process: what a bad step or a restart goes back to first. None: checkpoints only.
      guard: What a bad step is (not finite, a spike): the run goes back to the last good state and
        on without that batch. None: a step that is not finite is still not taken.
      skip_steps: Steps (from 1, as in the metrics) whose batches are left out.
      check_replicas_every: Steps between two comparisons of all copies of replicated arrays.
      progress: Show a progress bar (plain lines where there is no terminal).

    Raises:
      DataError: The loader's batches are not what the plan was made for, or not those of the run
        that is resumed.
      RestoreMismatch: `directory` belongs to another model. Nothing is overwritten.
      UnstableRunError: The loss stays bad although the run went back.
      ReplicaDivergenceError: Copies of an array differ; names the leaf and the devices.
      DistributedError: The processes do not run the same program, or read different data.

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
    report.phase("restore")
    settings = {
        "num_steps": num_steps, "seed": seed, "has a directory": path is not None,
        "has a state": state is not None, "save_every": save_every, "max_to_keep": max_to_keep,
        "eval_every": eval_every, "snapshot_every": snapshot_every, "guard": guard,
        "check_replicas_every": check_replicas_every,
    }  # fmt: skip
    check_run(plan, {"data": loader, "eval data": eval_loader}, settings)
    saved = SavedStates(path, plan, loader, max_to_keep, in_memory=snapshot_every is not None)
    state, resumed = saved.resume(lambda: plan.init(seed) if state is None else state)
    result = FitResult(state=state, directory=path)
    if path is not None and is_main:
        listeners.append(MetricsLog(path / "metrics.jsonl"))
    listeners.append(StepOracle(prints=progress))
    first = int(state.step)
    run = RunInfo(plan, first, num_steps, path, loader.global_batch_size, _tokens(plan), is_main)
    _tell(listeners, "on_start", run)
    if resumed and is_main and progress:
        print(resumed)

    shardings = plan.layout.batch_shardings
    local = isinstance(plan.strategy.sync, LocalSGD | DiLoCo | Gossip)
    watch = LossWatch(guard, saved, path, seed, skip_steps, local)
    replicas = _ReplicaCheck(plan, saved, check_replicas_every, first)
    pending: collections.deque[_Pending] = collections.deque()
    compiled = stopping = saving = snapping = False
    with (
        _ending(listeners, result, loader, report),
        saved,
        Preemption() as stop,
        _watchdog(report),
    ):
        check_first_batch(loader, first, watch.skip)
        done = first
        while done < num_steps:
            step, done = done, done + 1
            if done in watch.skip:
                result.state = skip_step(result.state)
            else:
                report.phase("data", step)
                started = time.perf_counter()
                batch = loader.batch(step, shardings)
                ready = time.perf_counter()
                if not compiled:
                    audit_first_batch(batch)
                report.phase("dispatch" if compiled else "first_step", step)
                result.state, metrics = plan.step(result.state, batch)
                pending.append(_Pending(done, metrics, started, ready))
                compiled = True
            report.phase("wait", step)
            stopping = stop.should_stop(done) or stopping
            between = done < num_steps and not stopping
            saving = between and (_due(done, save_every) or saving)
            snapping = between and (_due(done, snapshot_every) or snapping)
            evaluating = between and eval_loader is not None and _due(done, eval_every)
            # Read the step before while the device works on this one. What is to be kept must be
            # known to be good: then this one too.
            look = not between or saving or snapping or evaluating or replicas.due(done)
            bad = _read(pending, 0 if look else 1, result, listeners, watch)
            if bad is not None:
                report.phase("restore", step)
                pending.clear()
                saving = snapping = False
                result.state = watch.go_back(bad)
                done = int(result.state.step)
                _forget_after(done, result, listeners)
                continue
            saved.poll()
            replicas.check(done, result.state)
            if _due(done, STRAGGLER_EVERY):
                _report_stragglers(report, is_main)
            if evaluating and eval_loader is not None:
                report.phase("eval", step)
                _evaluate(plan, result, eval_loader, done, listeners)
            if snapping and not watch.uneasy:
                report.phase("ckpt", step)
                saved.snapshot(result.state)
                snapping = False
            if saving and not watch.uneasy:  # else after the next good step
                report.phase("ckpt", step)
                saved.save(result.state)
                _tell(listeners, "on_checkpoint", done)
                saving = False
            if stopping:
                result.stopped = stop.reason
                break
        done = int(result.state.step)
        if eval_loader is not None and result.stopped is None and done > first:
            report.phase("eval")
            _evaluate(plan, result, eval_loader, done, listeners)
        report.phase("ckpt")
        if done > first:
            saved.save(result.state)
            _tell(listeners, "on_checkpoint", done)
        saved.wait()
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


def _record(item: _Pending, result: FitResult, listeners: Sequence[Callback]) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(item.metrics).items()}
    now = time.perf_counter()
    values["seconds"] = now - item.started
    values["data_seconds"] = item.ready - item.started
    result.history.append({"step": item.step, **values})
    _tell(listeners, "on_step", item.step, values)
    return values


def _read(
    pending: collections.deque[_Pending],
    keep: int,
    result: FitResult,
    listeners: Sequence[Callback],
    watch: LossWatch,
) -> BadStep | None:
    """Read the metrics of all but `keep` steps; ends at a step that the run must go back for."""
    while len(pending) > keep:
        item = pending.popleft()
        values = _record(item, result, listeners)
        if (bad := watch.see(item.step, values)) is not None:
            return bad
    return None


def _forget_after(step: int, result: FitResult, listeners: Sequence[Callback]) -> None:
    """The run went back to `step`: what came after has not happened."""
    result.history[:] = [h for h in result.history if h["step"] <= step]
    result.evals[:] = [e for e in result.evals if e["step"] <= step]
    _tell(listeners, "on_rollback", step)


class _ReplicaCheck:
    """Compares the copies of replicated arrays now and then."""

    def __init__(self, plan: Plan, saved: SavedStates, every: int | None, first: int):
        self._saved = saved
        self._every = every if has_replicas(plan.abstract_state) else None
        self._passed = first

    def due(self, step: int) -> bool:
        """Whether the state of this step is to be checked."""
        return _due(step, self._every)

    def check(self, step: int, state: TrainState) -> None:
        """Raise if copies differ; what was saved since the last good check is set aside."""
        if not self.due(step):
            return
        if found := replica_divergence(state):
            aside = self._saved.distrust(self._passed)
            raise ReplicaDivergenceError(
                f"at step {step} copies of replicated arrays differ: "
                + "; ".join(map(str, found[:5]))
                + (f" and {len(found) - 5} more" if len(found) > 5 else "")
                + f". They were equal at step {self._passed}. Checkpoints set aside as N.suspect: "
                f"{aside or 'none'}. A device or its memory computes wrongly: take it out, and "
                "start again"
            )
        self._passed = step


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


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
