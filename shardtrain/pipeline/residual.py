"""What slot W needs of slot B of the same microbatch."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """Values slot B leaves for slot W.

    Args:
        once: values that all layers of a stage share.
        layers: values of every layer, `[layers, ...]`.
    """

    once: list[Any]
    layers: list[Any]
