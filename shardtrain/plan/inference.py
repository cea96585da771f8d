"""Where the author annotated nothing: logical axes found in the traced loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.modules import ModelForm
from shardtrain.modules.adapt import FROZEN
from shardtrain.partitioning import Inferred
from shardtrain.partitioning.infer.solve import Solution, solve
from shardtrain.partitioning.infer.table import AxisTable, infer_axes
from shardtrain.partitioning.resolve import REPLICATED_SHARE
from shardtrain.partitioning.rules import is_glob
from shardtrain.strategy import Strategy
from shardtrain.train import LossFn

_DEAR = 0.02
"""Weight of bytes sent where nothing else would be split: feature maps are larger than kernels."""

INFERRED_AXES = ("tensor", "expert", "context")
"""Mesh axes whose use depends on what the model computes; data and fsdp fit any model."""


@dataclass(frozen=True)
class InferredLayout:
    """What inference decided.

    Args:
      params: Parameter path -> layout over tensor and expert.
      inputs: Batch path -> dim that goes over `context`.
      findings: What is not sharded, and why.
      names: Logical axis names found.
    """

    params: Mapping[str, Inferred]
    inputs: Mapping[str, int]
    findings: tuple[str, ...]
    names: frozenset[str]


def axis_table(form: ModelForm, loss: LossFn, batch: Any) -> AxisTable:
    """The logical axes of a model, from its loss; allocates nothing.

    Args:
      form: The model.
      loss: `(params, variables, batch, key) -> (sums, variables)` without sharding constraints.
      batch: One abstract microbatch.
    """

    # What an adapted model leaves frozen is sharded like the rest.
    frozen = {k: v for k, v in form.abstract_variables.items() if k == FROZEN and form.base}

    def total(params: Any, batch: Any) -> Any:
        variables = jax.tree.map(_placeholder, form.abstract_variables)
        if frozen:
            variables |= {FROZEN: params[FROZEN]}
            params = {k: v for k, v in params.items() if k != FROZEN}
        return loss(params, variables, batch, jax.random.key(0))[0].loss.total

    params = {**form.abstract_params, **frozen} if frozen else form.abstract_params
    return infer_axes(total, params, batch)


def infer_layout(
    table: AxisTable, form: ModelForm, strategy: Strategy, sizes: Mapping[str, int]
) -> InferredLayout:
    """Choose what to shard over `tensor`, `expert` and `context`.

    The author's annotations and the user's rules are fixed points: they win.
    """
    axes = {a: sizes[a] for a in INFERRED_AXES if sizes[a] > 1}
    names = frozenset(n for row in table.rows for dim in row.axes for n in dim)
    fixed = {k: v for k, v in strategy.rules.items() if not is_glob(k) and k in names}
    fixed = {k: v if v in axes else None for k, v in fixed.items()}
    solution = solve(table, axes, fixed=fixed)
    if axes.get("tensor", 1) > 1 and _mostly_whole(solution, table) and not form.annotations:
        # What was asked for is better done dearly than not at all.
        other = solve(table, axes, fixed=fixed, channels=True, comm_weight=_DEAR)
        solution = other if _held(other, table) < _held(solution, table) else solution
    rows = {row.path: row for row in table.rows}
    params = {
        path: Inferred(spec, _logical(rows[path].axes), solution.reasons[path])
        for path, spec in solution.specs.items()
    }
    inputs = {
        path: next(i for i, entry in enumerate(spec) if entry is not None)
        for path, spec in solution.inputs.items()
        if any(spec)
    }
    findings = () if form.annotations else tuple(solution.findings)
    return InferredLayout(params, inputs, findings, names)


def _held(solution: Solution, table: AxisTable) -> int:
    """Bytes of parameters that every device would hold whole."""
    return sum(row.bytes for row in table.rows if not any(solution.specs[row.path]))


def _mostly_whole(solution: Solution, table: AxisTable) -> bool:
    total = sum(row.bytes for row in table.rows)
    return _held(solution, table) > REPLICATED_SHARE * total


def _logical(axes: tuple[tuple[str, ...], ...]) -> tuple[Any, ...]:
    return tuple(None if not dim else (dim[0] if len(dim) == 1 else tuple(dim)) for dim in axes)


def _placeholder(leaf: Any) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)
