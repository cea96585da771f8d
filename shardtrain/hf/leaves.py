"""Where a plan keeps the parameters of the model that its author wrote."""

from collections.abc import Mapping
from typing import Any

from shardtrain.hf.pieces import Pieces, stage_major
from shardtrain.modules.adapt import FROZEN
from shardtrain.plan import Plan
from shardtrain.pytree import leaves_by_path
from shardtrain.train import TrainState

_CORRECTIONS = ("lora_a", "lora_b")


def values_of(state: TrainState) -> dict[str, Any]:
    """Path -> leaf of what the model is made of: `params/...` and `variables/...`."""
    return leaves_by_path({"params": state.params, "variables": state.variables})


def model_leaves(plan: Plan) -> dict[str, str]:
    """Parameter path, as the model's author knows it -> path in `values_of`, without a pipeline."""
    leaves = values_of(plan.abstract_checkpoint)
    frozen = f"variables/{FROZEN}/"
    found = {p.removeprefix(frozen): p for p in leaves if p.startswith(frozen)}
    for path in leaves:
        if path.startswith("params/"):
            name = path.removeprefix("params/")
            weight, _, last = name.rpartition("/")
            if not (last in _CORRECTIONS and weight in found):
                found[name] = path
    return found


def corrected(plan: Plan) -> frozenset[str]:
    """Parameter paths that have a low-rank correction."""
    leaves = values_of(plan.abstract_checkpoint)
    return frozenset(p for p in model_leaves(plan) if f"params/{p}/{_CORRECTIONS[0]}" in leaves)


def in_layout(plan: Plan, found: Mapping[str, Pieces]) -> dict[str, Pieces]:
    """By path without a pipeline -> by path in `values_of(plan.abstract_state)`."""
    if plan.pipelined is None:
        return dict(found)
    pipeline = plan.pipelined.pipeline
    out: dict[str, Pieces] = {}
    for part, layout in (("params", pipeline.params), ("variables", pipeline.variables)):
        mine = _below(f"{part}/", found)
        out |= {f"{part}/{path}": x for path, x in stage_major(mine, layout).items()}
    return out


def _below(prefix: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {p.removeprefix(prefix): x for p, x in found.items() if p.startswith(prefix)}
