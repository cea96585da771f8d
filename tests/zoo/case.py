from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

VOCAB = 32
LENGTH = 8


@dataclass(frozen=True)
class Case:
    """One model family.

    Args:
      name: Its name in tables.
      make: The model, freshly made.
      loss: Its loss function.
      batch: `(rows, seed) -> batch`.
      splits: Its loss over microbatches equals the loss over the whole batch (no batch statistics,
        no dropout drawn per call, no pairs of examples).
      scalar: The loss is a bare scalar, so microbatches need `equal_microbatches`.
      tolerance: Relative to the gradient norm, in float32.
    """

    name: str
    make: Callable[[], Any]
    loss: Callable[..., Any]
    batch: Callable[[int, int], Any]
    splits: bool = True
    scalar: bool = False
    tolerance: float = 1e-5


def tokens(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Token ids with ragged masks; row 1 is masked out altogether."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH, rows)
    lengths[1] = 0
    return {
        "tokens": rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32),
        "mask": (np.arange(LENGTH)[None] < lengths[:, None]).astype(np.float32),
    }


def images(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Small images with a label each."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(rows, 8, 8, 4)).astype(np.float32),
        "label": rng.integers(0, 8, rows).astype(np.int32),
    }


def features(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Feature vectors and regression targets."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, 16)).astype(np.float32),
        "y": rng.normal(size=(rows, 8)).astype(np.float32),
    }
