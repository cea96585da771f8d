"""Optimizers on stage-stacked parameters: the same update as without a pipeline.

Adam, SGD, Lion and their like treat every number alone, so a stack of layers can be updated as one
array. Others look at whole arrays (LAMB, LARS, Adafactor, Muon, clipping by block, masks that ask
for `ndim`): they must see every layer as an array of its own. `pipelined_optimizer` finds out by
trying both on small random arrays, and refuses an optimizer for which neither gives the
unpipelined update (it compares layers of different stages, or asks for parameter paths).

*Per layer* means: the optimizer is mapped over stages (`jax.vmap`), and sees each layer of a stage
as a separate array, the other parameters beside them, and one scalar more whose gradient
completes the global norm, so that clipping by global norm sees the norm of the whole model.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardtrain.errors import StageSplitError
from shardtrain.pipeline.alike import treats_layers_alike
from shardtrain.pipeline.buffers import AXIS
from shardtrain.pipeline.stages import (
    StageLayout,
    StageMajor,
    from_stage_major,
    to_stage_major,
)
from shardtrain.pytree import leaves_by_path, map_with_path

_PROBE_DIM = 160  # above Adafactor's factoring threshold of 128
_PROBE_SIZE = 8_000_000  # numbers in a probe, at most
_PROBE_LAYERS = 2  # in each chunk, where layers are treated alike
_STEPS = 2

Optimizer = optax.GradientTransformation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerArrays:
    """`StageMajor` with every layer as an array of its own.

    Args:
        outer: path -> array.
        blocks: leaf name -> one array `[P, ...]` per virtual stage and layer within the chunk.
        rest: `[P]`: what is missing in a stage's view of the global norm.
    """

    outer: Any
    blocks: Any
    rest: Any


_AXES = LayerArrays(outer=None, blocks=0, rest=0)


def pipelined_optimizer(optimizer: Optimizer, params: Any, layout: StageLayout) -> Optimizer:
    """The optimizer for parameters in `StageMajor` form.

    Args:
        optimizer: any optax transformation, for the model's own parameter tree.
        params: abstract parameters in the model's own layout.
        layout: their layout.

    Raises:
        StageSplitError: neither form gives the unpipelined update.
    """
    per_layer = map_layers(optimizer)
    small = _probe_tree(params)
    if layout.per_chunk > _PROBE_LAYERS and treats_layers_alike(optimizer, params, layout):
        small, layout = _few_layers(small, layout)
    expected = _run(optimizer, small)
    reasons = []
    for name, candidate in (("stacked", optimizer), ("per layer", per_layer)):
        try:
            found = from_stage_major(_run(candidate, to_stage_major(small, layout)), layout)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reasons.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        worst = _difference(found, expected)
        if worst < 1e-5:
            return candidate
        reasons.append(f"{name}: updates differ by {worst:.1e} of the largest")
    raise StageSplitError(
        "this optimizer cannot update a pipelined model: its update of stage-stacked parameters "
        "differs from the unpipelined one ("
        + "; ".join(reasons)
        + "). It compares layers with each "
        "other or asks for parameter paths. Use another optimizer or mask, or pipeline=1"
    )


def map_layers(optimizer: Optimizer) -> Optimizer:
    """An optimizer over `StageMajor` that sees every layer as an array of its own."""

    def init(params: Any) -> Any:
        mapped: Any = jax.vmap(optimizer.init, in_axes=(_AXES,), out_axes=0)
        return mapped(_layers(params, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        like = updates if params is None else params
        args = (_layers(updates, updates), state, _layers(like, like))
        mapped: Any = jax.vmap(
            optimizer.update, in_axes=(_AXES, 0, _AXES), out_axes=0, spmd_axis_name=AXIS
        )
        found, state = mapped(*args)
        outer = {path: x[0] for path, x in found.outer.items()}
        blocks = {
            name: jnp.stack(parts, axis=1).reshape(updates.blocks[name].shape)
            for name, parts in found.blocks.items()
        }
        return StageMajor(outer, blocks), state

    return Optimizer(init, update)


def _layers(tree: StageMajor, grads: StageMajor) -> LayerArrays:
    blocks = {
        name: [
            x.reshape(x.shape[0], -1, *x.shape[3:])[:, n] for n in range(x.shape[1] * x.shape[2])
        ]
        for name, x in tree.blocks.items()
    }
    squares = [
        jnp.sum(jnp.square(g.astype(jnp.float32)), axis=range(1, g.ndim))
        for g in grads.blocks.values()
    ]
    own = sum(squares, jnp.zeros(()))
    # The sum of the others, not total minus own: a difference of like numbers loses its digits.
    others = jnp.where(jnp.eye(own.size, dtype=bool), 0.0, own[None, :]).sum(axis=1)
    return LayerArrays(tree.outer, blocks, jnp.sqrt(others))


def _probe_tree(params: Any) -> Any:
    """Random arrays with the parameters' tree and ranks, their dims cut to a probe's size."""

    def cut(dim: int) -> list[tuple[int, ...]]:
        return [tuple(min(n, dim) for n in np.shape(x)) for x in jax.tree.leaves(params)]

    large, small = cut(_PROBE_DIM), cut(8)
    shapes = large if sum(map(math.prod, large)) < _PROBE_SIZE else small
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    return jax.tree.unflatten(jax.tree.structure(params), arrays)


def _few_layers(params: Any, layout: StageLayout) -> tuple[Any, StageLayout]:
    """The first layers of a probe tree, as many as keep several in each chunk, and their layout."""
    count = layout.num_stages * layout.virtual_stages * _PROBE_LAYERS
    leaves = tuple(
        leaf if leaf.stacked else dataclasses.replace(leaf, paths=leaf.paths[:count])
        for leaf in layout.leaves
    )
    stacked = {leaf.paths[0] for leaf in leaves if leaf.stacked}
    dropped = {p for leaf in layout.leaves for p in leaf.paths[count:]}
    cut = lambda path, x: None if path in dropped else x[:count] if path in stacked else x
    few = map_with_path(cut, params)
    paths = tuple(leaves_by_path(few))
    found = dataclasses.replace(
        layout, count=count, leaves=leaves, treedef=jax.tree.structure(few), paths=paths
    )
    return few, found


def _run(optimizer: Any, params: Any) -> Any:
    """Sum of the updates of a few steps with fixed gradients."""

    def run(params: Any) -> Any:
        state, total = optimizer.init(params), None
        for step in range(_STEPS):
            grads = jax.tree.map(lambda x: x * (1.0 + step) + 0.1 * jnp.sin(7.0 * x), params)
            updates, state = optimizer.update(grads, state, params)
            total = updates if total is None else jax.tree.map(jnp.add, total, updates)
        return total

    return jax.jit(run)(params)


def _difference(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    worst = [
        float(
            np.max(np.abs(np.asarray(a) - np.asarray(b))) / (np.max(np.abs(np.asarray(b))) + 1e-12)
        )
        for a, b in pairs
    ]
    return max(worst, default=0.0)
