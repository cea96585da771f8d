"""Trials on devices of their own: each a plan with the user's strategy, several at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from shardtrain.data import DataLoader
from shardtrain.fit import evaluate
from shardtrain.plan import Plan, plan
from shardtrain.strategy import Strategy
from shardtrain.sweep.result import Trial
from shardtrain.train import TrainState


class SubMeshes:
    """Trials that each have some of the devices.

    Args:
      make: `(**hyperparameters) -> (model, loss_fn, optimizer)`.
      strategy: Of each trial.
      size: Devices it needs.
      trials: The trials.
      devices: All devices.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        strategy: Strategy,
        size: int,
        trials: Sequence[Trial],
        devices: Sequence[jax.Device],
    ):
        self.make, self.strategy, self.trials = make, strategy, list(trials)
        self.meshes = [devices[i : i + size] for i in range(0, len(devices) - size + 1, size)]
        self.running: dict[int, tuple[Plan, TrainState]] = {}

    def advance(self, loader: DataLoader, start: int, stop: int) -> None:
        """Train all trials from step `start` to `stop`, as many at a time as there are meshes."""
        width = len(self.meshes)
        for first in range(0, len(self.trials), width):
            self._wave(self.trials[first : first + width], loader, start, stop)

    def evaluate(self, loader: DataLoader) -> list[float]:
        """Loss of each trial over one pass of a loader; nan: it failed."""
        return [
            evaluate(*self.running[t.number], loader)["loss"]
            if t.number in self.running
            else float("nan")
            for t in self.trials
        ]

    def keep(self, trials: Sequence[Trial]) -> None:
        """Go on with some of the trials."""
        self.trials = list(trials)
        self.running = {t.number: self.running[t.number] for t in trials}

    def state_of(self, trial: Trial) -> TrainState:
        """One trial's state, on its devices."""
        return self.running[trial.number][1]

    def _wave(self, trials: Sequence[Trial], loader: DataLoader, start: int, stop: int) -> None:
        losses: dict[int, list[jax.Array]] = {t.number: [] for t in trials}
        skipped: dict[int, list[jax.Array]] = {t.number: [] for t in trials}
        for number in range(start, stop):
            batch = loader.batch(number)
            for slot, trial in enumerate(trials):
                if trial.status == "failed":
                    continue
                metrics = self._step(trial, slot, loader, batch)
                if metrics is not None:
                    losses[trial.number].append(metrics["loss"])
                    skipped[trial.number].append(metrics["skipped"])
        for trial in trials:
            if trial.status == "failed":
                continue
            trial.losses += [float(x) for x in losses[trial.number]]
            trial.steps = stop
            count = sum(int(x) for x in skipped[trial.number])
            if 2 * count > stop - start:
                trial.fail(f"{count} of {stop - start} steps were not finite")

    def _step(self, trial: Trial, slot: int, loader: DataLoader, batch: Any) -> Any:
        # Whatever the user's model, loss or optimizer raises with these hyperparameters ends this
        # trial alone: that is what a sweep promises.
        try:
            if trial.number not in self.running:
                made = self._plan(trial, self.meshes[slot], loader)
                self.running[trial.number] = made, made.init(trial.hyperparameters.get("seed", 0))
            made, state = self.running[trial.number]
            state, metrics = made.step(state, batch)
            # On CPU the collectives of two programs at once can wait for each other for ever.
            if made.mesh.devices.flat[0].platform == "cpu":
                jax.block_until_ready(metrics)
        except Exception as error:  # noqa: BLE001
            self.running.pop(trial.number, None)
            trial.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        self.running[trial.number] = made, state
        return metrics

    def _plan(self, trial: Trial, devices: Sequence[jax.Device], loader: DataLoader) -> Plan:
        given = {k: v for k, v in trial.hyperparameters.items() if k != "seed"}
        model, loss_fn, optimizer = self.make(**given)
        batch = loader.abstract_batch
        return plan(model, loss_fn, optimizer, batch, self.strategy, devices=devices)
