"""`st.sweep`: many choices of hyperparameters at once."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from rich.progress import Progress

from shardtrain.data import DataLoader
from shardtrain.errors import SweepError
from shardtrain.plan import Plan, plan
from shardtrain.strategy import AXES, Strategy
from shardtrain.sweep.result import SweepResult, Trial, survivors
from shardtrain.sweep.space import (
    OptunaSampler,
    RandomSampler,
    Sampler,
    Space,
    Uniform,
    check_space,
    grid,
)
from shardtrain.sweep.stacked import Stack
from shardtrain.sweep.sub_meshes import SubMeshes

_LAST = 10  # steps whose mean training loss ranks trials where there is no eval loader


def sweep(
    make: Callable[..., tuple[Any, Any, Any]],
    space: Space,
    loader: DataLoader,
    num_steps: int,
    num_trials: int | None = None,
    *,
    strategy: Strategy | str | None = None,
    eval_loader: DataLoader | None = None,
    halving: int | None = None,
    min_steps: int | None = None,
    sampler: str | Sampler = "random",
    rounds: int = 1,
    stacked: bool | None = None,
    static: Sequence[str] = (),
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> SweepResult:
    """Train a model with many hyperparameters on the same batches, and rank them.

    Without a strategy, trials that differ in floats only (learning rates, weight decay, loss
    weights) are one SPMD program over a mesh axis `trial`: compiled once, each device training its
    share of them. Trials that differ in anything else (widths, names, integers) get programs of
    their own. With a strategy over several devices, each trial is a plan on so many, several trials
    at a time. A trial that fails does not stop the others.

    Args:
      make: `make(**hyperparameters) -> (model, loss_fn, optimizer)`, as for `st.plan`. A
        hyperparameter named `seed` is not passed on: it seeds parameters and random keys.
      space: Name -> `st.Uniform(low, high, log=...)` or a list of choices.
      loader: Global batches, the same for all trials.
      num_steps: Optimizer steps of a trial that is not stopped.
      num_trials: How many to draw; None: every combination of the choices.
      strategy: Mesh axes of each trial; one without axes sets precision, microbatches and the like.
      eval_loader: Trials are ranked by the loss over it; None: by the mean training loss of the
        last 10 steps.
      halving: Eta: at growing steps only the best 1 / eta go on (arXiv:1502.07943); None: all do.
      min_steps: Steps before the first cut; None: so that one is left at the end.
      sampler: "random", "optuna" (extra `sweep`), or an object with `ask` and `tell`.
      rounds: Trials are proposed in so many rounds, each with the values of the former.
      stacked: Trials as one program; None: where the strategy needs one device. False: each on
        devices of its own.
      static: Float hyperparameters that Python code needs as numbers.
      seed: Of the draws.
      devices: The devices to use; None: all.
      progress: Show a progress bar.

    Raises:
      SweepError: The space is empty, a trial's model differs in a traced hyperparameter, or the
        devices do not suffice for one trial.

    Example:
      >>> import numpy as np, optax
      >>> from shardtrain.data import DataLoader
      >>> from shardtrain.modules import Functional
      >>> import jax.numpy as jnp
      >>> data = DataLoader({"x": np.ones((8, 2), np.float32)}, global_batch_size=8)
      >>> def make(learning_rate):
      ...     model = Functional(init=lambda key: {"w": jnp.ones(2)})
      ...     return model, lambda v, b: jnp.mean((b["x"] @ v["w"]) ** 2), optax.sgd(learning_rate)
      >>> found = sweep(make, {"learning_rate": [0.0, 0.1]}, data, 5, progress=False)
      >>> found.best.hyperparameters
      {'learning_rate': 0.1}
    """
    check_space(space)
    _check_counts(num_steps, num_trials, halving, rounds)
    if isinstance(strategy, str):
        strategy = Strategy.parse(strategy)
    # Trials bring optimizers for the model's own arrays, which stacked layers would not be.
    strategy = (strategy or Strategy()).replace(scan_layers=False)
    devices = list(jax.devices() if devices is None else devices)
    runs = _Runs(make, loader, strategy, stacked, static, devices)
    asked: Sampler | None = None
    points = grid(space) if num_trials is None else None
    if points is None:
        asked = _sampler(sampler, space, seed)
    count = len(points) if points is not None else int(num_trials or 0)
    trials: list[Trial] = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("sweep", total=rounds)
        for each in range(rounds):
            size = count // rounds + (each < count % rounds)
            new = points if points is not None else (asked.ask(size) if asked else [])
            batch = [Trial(len(trials) + i, point) for i, point in enumerate(new)]
            _run(runs.start(batch), batch, loader, eval_loader, num_steps, halving, min_steps)
            values = [None if t.status == "failed" else t.value for t in batch]
            if asked is not None:
                asked.tell([t.hyperparameters for t in batch], values)
            trials += batch
            bar.update(task, advance=1)
    metric = "loss" if eval_loader is None else "eval loss"
    return SweepResult(tuple(trials), metric, runs.programs)


def _run(
    groups: Sequence[Stack | SubMeshes],
    trials: Sequence[Trial],
    loader: DataLoader,
    eval_loader: DataLoader | None,
    num_steps: int,
    halving: int | None,
    min_steps: int | None,
) -> None:
    """Train to each rung, rank, and go on with those that are left."""
    before = 0
    for stop in rungs(num_steps, len(trials), halving, min_steps):
        for group in groups:
            if group.trials:
                group.advance(loader, before, stop)
                _set_values(group, eval_loader)
        before = stop
        if stop < num_steps and halving is not None:
            left = survivors(trials, halving)
            for trial in trials:
                if trial.status == "running" and trial not in left:
                    trial.status, trial.reason = "stopped", f"others were better at step {stop}"
        for group in groups:
            for trial in group.trials:
                if trial.status == "stopped" or (stop == num_steps and trial.status == "running"):
                    trial.state = group.state_of(trial)
            going = [t for t in group.trials if t.status == "running"]
            if going and len(going) < len(group.trials):
                group.keep(going)
            elif not going:
                group.trials = []
    for trial in trials:
        if trial.status == "running":
            trial.status = "done"


def rungs(num_steps: int, num_trials: int, halving: int | None, min_steps: int | None) -> list[int]:
    """Steps at which trials are ranked; the last is `num_steps`.

    Args:
      num_steps: Steps of a trial that is not stopped.
      num_trials: Trials at the start.
      halving: Eta, or None.
      min_steps: Steps before the first cut.

    Example:
      >>> rungs(80, 8, 2, None), rungs(80, 8, None, None)
      ([10, 20, 40, 80], [80])
    """
    if halving is None:
        return [num_steps]
    cuts = max(0, math.ceil(math.log(max(num_trials, 1), halving) - 1e-9))
    found = [num_steps]
    while len(found) <= cuts and found[0] // halving >= max(1, min_steps or 1):
        found.insert(0, found[0] // halving)
    return found


class _Runs:
    """Starts groups of trials, and counts their programs."""

    def __init__(
        self,
        make: Callable[..., Any],
        loader: DataLoader,
        strategy: Strategy,
        stacked: bool | None,
        static: Sequence[str],
        devices: Sequence[jax.Device],
    ):
        self.make, self.loader, self.strategy = make, loader, strategy
        self.static, self.devices = static, devices
        self.size = math.prod(max(1, getattr(strategy, axis)) for axis in AXES)
        self.programs = 0
        if any(getattr(strategy, axis) == -1 for axis in AXES):
            raise SweepError("-1 takes all devices; say how many each trial has, e.g. data=2")
        if self.size > len(devices):
            raise SweepError(
                f"a trial under {strategy} needs {self.size} devices, there are {len(devices)}"
            )
        self.stacked = self.size == 1 if stacked is None else stacked
        if self.stacked and self.size > 1:
            raise SweepError(
                f"stacked trials are plain code on one device each; {strategy} needs {self.size}. "
                "Leave stacked out, or the mesh axes"
            )

    def start(self, trials: Sequence[Trial]) -> list[Stack | SubMeshes]:
        """The groups in which trials run."""
        if not self.stacked:
            self.programs += len(trials)
            return [SubMeshes(self.make, self.strategy, self.size, trials, self.devices)]
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            groups.setdefault(self._static_part(trial), []).append(trial)
        return [stack for group in groups.values() if (stack := self._stack(group)) is not None]

    def _stack(self, trials: list[Trial]) -> Stack | None:
        # As in `SubMeshes`: what the user's code raises for these hyperparameters ends these
        # trials, not the others; errors of the sweep itself are raised.
        try:
            made = self._plan(trials[0])
            for trial in trials[1:]:
                _same_model(made, self._plan(trial), trial, trials[0])
            traced = [n for n, v in trials[0].hyperparameters.items() if self._traced(n, v)]
            stack = Stack(self.make, made, traced, trials, self.devices)
        except SweepError:
            raise
        except Exception as error:  # noqa: BLE001
            for trial in trials:
                trial.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        self.programs += 1
        return stack

    def _plan(self, trial: Trial) -> Plan:
        given = {k: v for k, v in trial.hyperparameters.items() if k != "seed"}
        model, loss_fn, optimizer = self.make(**given)
        strategy, batch = self.strategy, self.loader.abstract_batch
        return plan(model, loss_fn, optimizer, batch, strategy, devices=self.devices[:1])

    def _traced(self, name: str, value: Any) -> bool:
        return isinstance(value, float) and name not in self.static

    def _static_part(self, trial: Trial) -> str:
        given = trial.hyperparameters.items()
        fixed = {k: v for k, v in given if not self._traced(k, v) and k != "seed"}
        return json.dumps(fixed, sort_keys=True, default=repr)


def _same_model(one: Plan, other: Plan, trial: Trial, first: Trial) -> None:
    """Floats that the model itself uses would be those of the first trial for all.

    Raises:
      SweepError: The models differ.
    """
    if _identity(one) == _identity(other):
        return
    raise SweepError(
        f"the model of trial {trial.number} ({trial.hyperparameters}) is not that of trial "
        f"{first.number} ({first.hyperparameters}): name the hyperparameter that the model uses in "
        "static=(...), and trials that differ in it get programs of their own"
    )


def _identity(made: Plan) -> Any:
    form = made.form
    text = ""
    if form.init is not None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        text = str(jax.make_jaxpr(form.init)(key))
    model = getattr(form.model, "model", form.model)
    if isinstance(model, nn.Module):
        return text, model
    if form.kind == "nnx" and callable(form.model):
        return text, nnx.graphdef(nnx.eval_shape(lambda: form.model(nnx.Rngs(0))))
    return text, None


def _set_values(group: Stack | SubMeshes, eval_loader: DataLoader | None) -> None:
    alive = [t for t in group.trials if t.status != "failed"]
    if eval_loader is None:
        for trial in alive:
            last = trial.losses[-_LAST:]
            trial.value = sum(last) / len(last)
    elif alive:
        for trial, value in zip(group.trials, group.evaluate(eval_loader), strict=True):
            if trial.status != "failed":
                trial.value = value
    for trial in alive:
        if trial.value is None or not math.isfinite(trial.value):
            trial.fail("its loss is not finite")


def _sampler(sampler: str | Sampler, space: Space, seed: int) -> Sampler:
    if not isinstance(sampler, str):
        return sampler
    if sampler == "random":
        return RandomSampler(space, seed)
    if sampler == "optuna":
        return OptunaSampler(space, seed)
    raise SweepError(f'sampler {sampler!r}: "random", "optuna", or an object with ask and tell')


def _check_counts(num_steps: int, num_trials: int | None, halving: int | None, rounds: int) -> None:
    counts = {"num_steps": num_steps, "num_trials": num_trials, "rounds": rounds}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise SweepError(f"{name} must be at least 1, not {value}")
    if halving is not None and halving < 2:
        raise SweepError(f"halving must be at least 2 (half of the trials go on), not {halving}")
    if num_trials is None and rounds > 1:
        raise SweepError("a grid has one round; say num_trials to draw in several rounds")


__all__ = ["SweepResult", "Trial", "Uniform", "sweep"]
