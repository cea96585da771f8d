"""Which example stands at which position of the endless global sequence.

The order is a pure function of (seed, position), never of a process, so that any number of
processes, any mesh and any restart sees the same global batches. Shuffling is grain's O(1) index
permutation (a new one in each epoch); weighted sampling inverts the cumulative weights at a hash of
the position.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from shardtrain.errors import DataError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the increment of splitmix64


@dataclasses.dataclass(frozen=True)
class Order:
    """Position in the global sequence → index into the source.

    Attributes:
        length: number of examples in the source.
        seed: 0 to 2**32 - 1.
        weights: None for a fresh permutation per epoch, else one sampling weight per example
            (draws with replacement).
        shuffle: False reads the source in order.
    """

    length: int
    seed: int = 0
    weights: Sequence[float] | np.ndarray | None = None
    shuffle: bool = True

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed must be an integer from 0 to 2**32 - 1, got {self.seed}.")
        if self.weights is not None:
            check_weights(np.asarray(self.weights), self.length)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Source indices, int64 `[n]`, at `positions`, int64 `[n]`.

        Example:
            >>> sorted(Order(4, seed=1).indices(np.arange(4)).tolist())
            [0, 1, 2, 3]
        """
        if self.weights is not None:
            return _weighted(np.asarray(self.weights, np.float64), self.seed, positions)
        if not self.shuffle:
            return np.asarray(positions, np.int64) % self.length
        import grain  # here, as it takes half as long as importing JAX: only a shuffle needs it

        permuted = grain.MapDataset.range(self.length).seed(self.seed).shuffle().repeat()
        return np.asarray([permuted[int(position)] for position in positions], np.int64)


def _weighted(weights: np.ndarray, seed: int, positions: np.ndarray) -> np.ndarray:
    cumulative = np.cumsum(weights / weights.sum())
    drawn = uniform(seed, positions) * cumulative[-1]
    # side="right" never lands on an example of weight 0, whose interval is empty
    index = np.searchsorted(cumulative, drawn, side="right")
    return np.minimum(index, np.flatnonzero(weights)[-1])


def uniform(seed: int, positions: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) that depends on (seed, position) only: splitmix64 (Steele 2014)."""
    with np.errstate(over="ignore"):
        z = (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z ^= (np.uint64(seed) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def example_rng(seed: int, position: int) -> np.random.Generator:
    """The random generator of the example at `position`; the same on every process and restart."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def check_weights(weights: np.ndarray, length: int) -> None:
    """Refuse weights that do not describe a distribution over `length` examples."""
    if weights.shape != (length,):
        raise DataError(
            f"weights need one number per example: shape ({length},), got {weights.shape}."
        )
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise DataError(
            f"weights must be finite and not negative: weights[{bad[0]}] = {weights[bad[0]]} "
            f"({bad.size} such of {length})."
        )
    if not weights.sum() > 0:
        raise DataError(f"all {length} weights are 0: no example could ever be drawn.")
