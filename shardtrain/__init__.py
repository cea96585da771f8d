"""shardtrain: sharded training for unmodified Flax models.

`import shardtrain as st` touches no device and sets no flag; each name is loaded when first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Strategy": "strategy",
    "simulate": "mesh",
    "plan": "plan",
    "Plan": "plan",
    "Functional": "modules",
    "Mean": "modules",
    "Aux": "modules",
    "cross_entropy": "modules",
    "TrainState": "train",
    "hardware": "hardware",
    "DataLoader": "data",
    "Checkpointer": "checkpoint",
    "fit": "fit",
    "FitResult": "fit",
    "evaluate": "fit",
    "Callback": "monitoring.callbacks",
    "verify": "verify",
    "VerifyReport": "verify",
    "init_distributed": "launch",
}
"""Public name -> the module that defines it."""

__version__ = "0.1.0"
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from shardtrain.data import DataLoader
    from shardtrain.hardware import hardware
    from shardtrain.mesh import simulate
    from shardtrain.modules import Aux, Functional, Mean, cross_entropy
    from shardtrain.plan import Plan, plan
    from shardtrain.strategy import Strategy
    from shardtrain.train import TrainState


class _Package(types.ModuleType):
    """Loads public names when first used.

    Some are named like the module that defines them (`st.plan`, `st.fit`): importing that module
    must not put it in the function's place, so submodules of those names are not set here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module 'shardtrain' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"shardtrain.{_EXPORTS[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *_EXPORTS])


sys.modules[__name__].__class__ = _Package
