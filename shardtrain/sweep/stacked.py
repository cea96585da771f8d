"""Trials as one program: state and hyperparameters have a leading trial dim.

Design: `jax.vmap` over the trials, the trial dim sharded over a mesh axis `trial`; devices left
over split each batch (`data`). Every trial sees the same batches, so these are read and sent once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardtrain.data import DataLoader
from shardtrain.errors import CompilerBugError, SweepError
from shardtrain.plan import Plan
from shardtrain.plan.known_bugs import check_known_bugs
from shardtrain.plan.loss import make_loss, user_loss
from shardtrain.sweep.result import Trial
from shardtrain.train import (
    TrainState,
    first_microbatch_key,
    make_eval,
    make_step,
    over_microbatches,
    over_rows,
    value_and_grad,
)

_PYTHON_NUMBER = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Stack:
    """Trials that share one program.

    Args:
      make: `(**hyperparameters) -> (model, loss_fn, optimizer)`.
      plan: The plan of the first of them on one device.
      traced: Names of the hyperparameters that differ as numbers within the program.
      trials: The trials.
      devices: All devices.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        plan: Plan,
        traced: Sequence[str],
        trials: Sequence[Trial],
        devices: Sequence[jax.Device],
    ):
        self.make, self.plan, self.traced = make, plan, tuple(traced)
        self.devices = tuple(devices)
        self.fixed = {k: v for k, v in trials[0].hyperparameters.items() if k not in traced}
        self._place(list(trials))
        seeds = np.array([_seed(t) for t in trials], np.uint32)
        init = jax.jit(jax.vmap(self._init), out_shardings=self.by_trial)
        try:
            self.state = init(self.numbers, seeds)
        except _PYTHON_NUMBER as error:
            raise self._needs_static(error) from error

    def advance(self, loader: DataLoader, start: int, stop: int) -> None:
        """Train all trials from step `start` to step `stop`."""
        step = jax.jit(
            jax.vmap(self._step, in_axes=(0, 0, None), spmd_axis_name="trial"),
            in_shardings=(self.by_trial, self.by_trial, self.by_row),
            out_shardings=self.by_trial,
            donate_argnums=(1,),
        )
        before = np.asarray(self.state.skipped)
        losses = []
        for number in range(start, stop):
            batch = loader.batch(number, self.by_row)
            try:
                self.state, metrics = step(self.numbers, self.state, batch)
            except _PYTHON_NUMBER as error:
                raise self._needs_static(error) from error
            losses.append(metrics["loss"])
            if number % 16 == 15:  # nothing is waited for in between, but not without bound
                jax.block_until_ready(losses[-1])
        table = np.asarray(jnp.stack(losses))
        skipped = np.asarray(self.state.skipped) - before
        for i, trial in enumerate(self.trials):
            trial.losses += [float(x) for x in table[:, i]]
            trial.steps = stop
            if 2 * skipped[i] > stop - start:
                trial.fail(f"{skipped[i]} of {stop - start} steps were not finite")

    def evaluate(self, loader: DataLoader) -> list[float]:
        """Loss of each trial over one pass of a loader."""
        run = jax.jit(
            jax.vmap(self._evaluate, in_axes=(0, 0, None, None), spmd_axis_name="trial"),
            in_shardings=(self.by_trial, self.by_trial, self.by_row, None),
            out_shardings=self.by_trial,
        )
        sums: Any = None
        for batch, rows in loader.eval_batches(self.by_row):
            mean = jax.block_until_ready(run(self.numbers, self.state, batch, rows))
            sums = mean if sums is None else jax.block_until_ready(sums + mean)
        return [float(x) for x in np.asarray(sums.value)]

    def keep(self, trials: Sequence[Trial]) -> None:
        """Go on with some of the trials."""
        where = np.array([self.trials.index(t) for t in trials])
        state = jax.tree.map(lambda x: x[where], self.state)
        self._place(list(trials))
        self.state = jax.device_put(state, self.by_trial)

    def state_of(self, trial: Trial) -> TrainState:
        """One trial's state, on the first device."""
        where = self.trials.index(trial)
        return jax.device_put(jax.tree.map(lambda x: x[where], self.state), self.devices[0])

    def _place(self, trials: list[Trial]) -> None:
        self.trials = trials
        across = math.gcd(len(trials), len(self.devices))
        num_rows = jax.tree.leaves(self.plan.layout.batch)[0].shape[0]
        rows = math.gcd(len(self.devices) // across, num_rows)
        used = np.array(self.devices[: across * rows]).reshape(across, rows)
        mesh = Mesh(used, ("trial", "data"), axis_types=(AxisType.Auto,) * 2)
        self.by_trial = NamedSharding(mesh, PartitionSpec("trial"))
        self.by_row = NamedSharding(mesh, PartitionSpec("data"))
        column = lambda name: np.array([t.hyperparameters[name] for t in trials], np.float32)
        self.numbers = {n: jax.device_put(column(n), self.by_trial) for n in self.traced}

    # -- one trial ------------------------------------------------------------------------------

    def _parts(self, numbers: dict[str, jax.Array]) -> tuple[Any, Any]:
        given = {k: v for k, v in self.fixed.items() if k != "seed"}
        _, loss_fn, optimizer = self.make(**given, **numbers)
        return user_loss(loss_fn), optimizer

    def _loss(self, loss: Any, train: bool) -> Any:
        plan, s = self.plan, self.plan.strategy
        made = make_loss(
            plan.form, loss, s, None, num_parts=s.num_microbatches if train else 1, train=train
        )
        bugs = check_known_bugs(plan.proof_loss, plan.layout, s)
        if reason := bugs.why_not_mapped(kernels=True):
            raise CompilerBugError(f"{reason}; give each trial a device of its own: stacked=False")
        return bugs.avoid_mapped(made, kernels=True)

    def _init(self, numbers: dict[str, jax.Array], seed: jax.Array) -> TrainState:
        form, key = self.plan.form, jax.random.key(seed)
        if form.init is not None:
            params, variables = form.init(key)
        elif form.adopt is not None:
            params, variables = form.adopt(key, None)
        else:
            assert form.initial is not None
            params, variables = form.initial
        _, optimizer = self._parts(numbers)
        zero = jnp.zeros((), jnp.int32)
        rng = jax.random.fold_in(key, 1)
        return TrainState(zero, params, optimizer.init(params), variables, rng, zero)

    def _step(self, numbers: dict[str, jax.Array], state: TrainState, batch: Any) -> Any:
        s = self.plan.strategy
        loss, optimizer = self._parts(numbers)
        grad_fn = value_and_grad(self._loss(loss, True), float32_sums=s.precision == "bf16")
        if s.num_microbatches > 1:
            grad_fn = over_microbatches(grad_fn, s.num_microbatches, lambda grads: grads)
        else:
            grad_fn = first_microbatch_key(grad_fn)
        return make_step(grad_fn, optimizer, s.max_grad_norm, lambda tree: tree)(state, batch)

    def _evaluate(
        self, numbers: dict[str, jax.Array], state: TrainState, batch: Any, rows: jax.Array
    ) -> Any:
        loss, _ = self._parts(numbers)
        return over_rows(make_eval(self._loss(loss, False)), ())(state, batch, rows)["loss"]

    def _needs_static(self, error: Exception) -> SweepError:
        names = ", ".join(self.traced)
        return SweepError(
            f"a hyperparameter ({names}) is used where Python needs a number, not an array: "
            f"{str(error).splitlines()[0]} Stacked trials share one program; name it in "
            "static=(...), and trials that differ in it get programs of their own"
        )


def _seed(trial: Trial) -> int:
    return int(trial.hyperparameters.get("seed", 0))
