"""Which hyperparameters to try: a grid, random draws, or an optuna study."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shardtrain.errors import SweepError

Hyperparameters = dict[str, Any]


@dataclass(frozen=True)
class Uniform:
    """A range of numbers to draw from.

    Args:
      low: Smallest.
      high: Largest.
      log: Draw the logarithm uniformly (learning rates, weight decay).

    Raises:
      SweepError: The range is empty, or a logarithmic one reaches 0.

    Example:
      >>> Uniform(1e-4, 1e-1, log=True).high
      0.1
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise SweepError(f"Uniform({self.low}, {self.high}) is empty: low must be below high")
        if self.log and self.low <= 0:
            raise SweepError(f"Uniform({self.low}, {self.high}, log=True): low must be positive")

    def draw(self, rng: np.random.Generator) -> float:
        """One number."""
        if self.log:
            return float(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return float(rng.uniform(self.low, self.high))


Space = Mapping[str, Uniform | Sequence[Any]]


class Sampler(Protocol):
    """Proposes trials, and may learn from their values."""

    def ask(self, count: int) -> list[Hyperparameters]:
        """Hyperparameters of `count` trials."""
        ...

    def tell(self, tried: Sequence[Hyperparameters], values: Sequence[float | None]) -> None:
        """Values of trials proposed before; None: the trial failed."""
        ...


def check_space(space: Space) -> None:
    """Refuse a space nothing can be drawn from.

    Raises:
      SweepError: It is empty, or an entry is neither a range nor a list of choices.
    """
    if not space:
        raise SweepError('the space is empty: give e.g. {"learning_rate": st.Uniform(1e-4, 1e-1)}')
    for name, entry in space.items():
        choices = isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) > 0
        if not isinstance(entry, Uniform) and not choices:
            raise SweepError(
                f"{name}: {entry!r} is neither st.Uniform(low, high) nor a list of choices"
            )


def grid(space: Space) -> list[Hyperparameters]:
    """Every combination of the choices.

    Raises:
      SweepError: An entry is a range.

    Example:
      >>> grid({"b1": [0.9, 0.95], "seed": [0]})
      [{'b1': 0.9, 'seed': 0}, {'b1': 0.95, 'seed': 0}]
    """
    ranges = [name for name, entry in space.items() if isinstance(entry, Uniform)]
    if ranges:
        raise SweepError(f"{ranges[0]} is a range: say how many to draw, num_trials=16")
    values: Any = space.values()
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


class RandomSampler:
    """Independent draws, reproducible by seed.

    Args:
      space: Ranges and choices.
      seed: Of the draws.
    """

    def __init__(self, space: Space, seed: int):
        self.space = space
        self.rng = np.random.default_rng(seed)

    def ask(self, count: int) -> list[Hyperparameters]:
        """Hyperparameters of `count` trials."""
        draw = lambda: {name: self._draw(entry) for name, entry in self.space.items()}
        return [draw() for _ in range(count)]

    def tell(self, tried: Sequence[Hyperparameters], values: Sequence[float | None]) -> None:
        """Nothing is learnt."""

    def _draw(self, entry: Uniform | Sequence[Any]) -> Any:
        if isinstance(entry, Uniform):
            return entry.draw(self.rng)
        return entry[int(self.rng.integers(len(entry)))]


class OptunaSampler:
    """An optuna study proposes (extra `sweep`).

    Args:
      space: Ranges and choices.
      seed: Of its sampler.
      study: The user's own study; None: a TPE sampler (Bergstra et al. 2011) that minimises.
    """

    def __init__(self, space: Space, seed: int, study: Any = None):
        try:
            import optuna
        except ImportError as error:
            raise SweepError(
                'sampler="optuna" needs optuna: pip install "shardtrain[sweep]"'
            ) from error
        self.space = space
        self.failed = optuna.trial.TrialState.FAIL
        # Several trials are asked for before one is told: `constant_liar` keeps them apart.
        tpe = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self.study = study or optuna.create_study(sampler=tpe)
        self.asked: list[tuple[Any, Hyperparameters]] = []

    def ask(self, count: int) -> list[Hyperparameters]:
        """Hyperparameters of `count` trials."""
        proposed = []
        for _ in range(count):
            trial = self.study.ask()
            point = {name: self._suggest(trial, name, entry) for name, entry in self.space.items()}
            self.asked.append((trial, point))
            proposed.append(point)
        return proposed

    def tell(self, tried: Sequence[Hyperparameters], values: Sequence[float | None]) -> None:
        """Values of trials proposed before; None: the trial failed."""
        for point, value in zip(tried, values, strict=True):
            index = next(i for i, (_, asked) in enumerate(self.asked) if asked is point)
            trial, _ = self.asked.pop(index)
            if value is None:
                self.study.tell(trial, state=self.failed)
            else:
                self.study.tell(trial, value)

    def _suggest(self, trial: Any, name: str, entry: Uniform | Sequence[Any]) -> Any:
        if isinstance(entry, Uniform):
            return trial.suggest_float(name, entry.low, entry.high, log=entry.log)
        return trial.suggest_categorical(name, list(entry))
