"""shardtrain: sharded training for unmodified Flax models.

`import shardtrain as st` touches no device and sets no flag; each name is loaded when first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AllReduce": "algorithms",
    "AsyncJob": "async_ps",
    "Aux": "modules",
    "Callback": "monitoring.callbacks",
    "Checkpointer": "checkpoint",
    "DataLoader": "data",
    "DiLoCo": "algorithms",
    "Exploration": "explore",
    "FitResult": "fit",
    "Float8": "algorithms",
    "Functional": "modules",
    "Gossip": "algorithms",
    "Int4": "algorithms",
    "Int8": "algorithms",
    "LocalSGD": "algorithms",
    "LossGuard": "monitoring.guard",
    "Mean": "modules",
    "Nesterov": "algorithms",
    "ParameterServer": "algorithms",
    "Plan": "plan",
    "PowerSGD": "algorithms",
    "Privacy": "algorithms",
    "Sign": "algorithms",
    "Strategy": "strategy",
    "TensorBoardLog": "monitoring.metrics_log",
    "TopK": "algorithms",
    "TrainState": "train",
    "Uniform": "sweep",
    "SweepResult": "sweep",
    "VerifyReport": "verify",
    "assert_collectives": "planner.assertions",
    "async_ps": "async_ps",
    "cross_entropy": "modules",
    "evaluate": "fit",
    "explain_oom": "explore",
    "explore": "explore",
    "export": "checkpoint",
    "export_hf": "hf",
    "fit": "fit",
    "freeze": "modules",
    "hardware": "hardware",
    "init_distributed": "launch",
    "inspect": "checkpoint",
    "load_hf": "hf",
    "lora": "modules",
    "plan": "plan",
    "replay_step": "recovery",
    "replica_divergence": "checkpoint",
    "restore": "checkpoint",
    "simulate": "mesh",
    "sweep": "sweep",
    "verify": "verify",
}
"""Public name -> the module that defines it."""

_MODULES = ("ops", "planner")
"""Public modules."""

__version__ = "0.1.0"
__all__ = sorted([*_EXPORTS, *_MODULES])

if TYPE_CHECKING:
    from shardtrain import ops as ops
    from shardtrain import planner as planner
    from shardtrain.algorithms import AllReduce as AllReduce
    from shardtrain.algorithms import DiLoCo as DiLoCo
    from shardtrain.algorithms import Float8 as Float8
    from shardtrain.algorithms import Gossip as Gossip
    from shardtrain.algorithms import Int4 as Int4
    from shardtrain.algorithms import Int8 as Int8
    from shardtrain.algorithms import LocalSGD as LocalSGD
    from shardtrain.algorithms import Nesterov as Nesterov
    from shardtrain.algorithms import ParameterServer as ParameterServer
    from shardtrain.algorithms import PowerSGD as PowerSGD
    from shardtrain.algorithms import Privacy as Privacy
    from shardtrain.algorithms import Sign as Sign
    from shardtrain.algorithms import TopK as TopK
    from shardtrain.async_ps import AsyncJob as AsyncJob
    from shardtrain.async_ps import async_ps as async_ps
    from shardtrain.checkpoint import Checkpointer as Checkpointer
    from shardtrain.checkpoint import export as export
    from shardtrain.checkpoint import inspect as inspect
    from shardtrain.checkpoint import replica_divergence as replica_divergence
    from shardtrain.checkpoint import restore as restore
    from shardtrain.data import DataLoader as DataLoader
    from shardtrain.explore import Exploration as Exploration
    from shardtrain.explore import explain_oom as explain_oom
    from shardtrain.explore import explore as explore
    from shardtrain.fit import FitResult as FitResult
    from shardtrain.fit import evaluate as evaluate
    from shardtrain.fit import fit as fit
    from shardtrain.hardware import hardware as hardware
    from shardtrain.hf import export_hf as export_hf
    from shardtrain.hf import load_hf as load_hf
    from shardtrain.launch import init_distributed as init_distributed
    from shardtrain.mesh import simulate as simulate
    from shardtrain.modules import Aux as Aux
    from shardtrain.modules import Functional as Functional
    from shardtrain.modules import Mean as Mean
    from shardtrain.modules import cross_entropy as cross_entropy
    from shardtrain.modules import freeze as freeze
    from shardtrain.modules import lora as lora
    from shardtrain.monitoring.callbacks import Callback as Callback
    from shardtrain.monitoring.guard import LossGuard as LossGuard
    from shardtrain.monitoring.metrics_log import TensorBoardLog as TensorBoardLog
    from shardtrain.plan import Plan as Plan
    from shardtrain.plan import plan as plan
    from shardtrain.planner.assertions import assert_collectives as assert_collectives
    from shardtrain.recovery import replay_step as replay_step
    from shardtrain.strategy import Strategy as Strategy
    from shardtrain.sweep import SweepResult as SweepResult
    from shardtrain.sweep import Uniform as Uniform
    from shardtrain.sweep import sweep as sweep
    from shardtrain.train import TrainState as TrainState
    from shardtrain.verify import VerifyReport as VerifyReport
    from shardtrain.verify import verify as verify


class _Package(types.ModuleType):
    """Loads public names when first used.

    Some are named like the module that defines them (`st.plan`, `st.fit`): importing that module
    must not put it in the function's place, so submodules of those names are not set here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"shardtrain.{name}")
        if name not in _EXPORTS:
            raise AttributeError(f"module 'shardtrain' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"shardtrain.{_EXPORTS[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *_EXPORTS])


sys.modules[__name__].__class__ = _Package
