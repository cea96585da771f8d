"""Pictures: loss curves, meshes, memory, parameters on a mesh.

Text drawings need nothing; figures import matplotlib when first used and never touch pyplot.
"""

import importlib
from typing import Any

_EXPORTS = {
    "loss_figure": "loss",
    "memory_figure": "memory",
    "memory_text": "text",
    "mesh_figure": "mesh",
    "mesh_text": "text",
    "parameters_figure": "parameters",
    "save": "figure",
    "sweep_figure": "sweep",
}
"""Public name -> the module that defines it."""

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'shardtrain.viz' has no attribute {name!r}")
    return getattr(importlib.import_module(f"shardtrain.viz.{_EXPORTS[name]}"), name)
