"""Optimizer states of pipelined models: where they live, and how checkpoints see them.

Two kinds exist (see `optimizer`): *stacked* states hold `StageMajor` trees; *mapped* states hold
`LayerArrays`, and every leaf has a leading dim over the stages.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.pipeline.buffers import AXIS
from shardtrain.pipeline.optimizer import LayerArrays
from shardtrain.pipeline.stages import (
    StageLayout,
    StageMajor,
    from_stage_major,
    to_stage_major,
)

_is_node = lambda x: isinstance(x, StageMajor | LayerArrays)


def is_mapped(state: Any) -> bool:
    """Whether an optimizer state is of the mapped kind."""
    nodes = jax.tree.leaves(state, is_leaf=_is_node)
    return any(isinstance(node, LayerArrays) for node in nodes)


def mapped_specs(state: Any, params: StageMajor) -> Any:
    """PartitionSpecs of a mapped state: the stages' dim over `pipeline`, behind it the parameter's.

    Args:
        state: abstract mapped state.
        params: PartitionSpecs of the parameters.
    """

    def behind(spec: PartitionSpec, skip: int, x: Any) -> Any:
        if not hasattr(x, "shape"):
            return x
        inner = [*tuple(spec)[skip:], *[None] * x.ndim][: x.ndim - 1]
        fits = len(tuple(spec)) - skip <= x.ndim - 1
        return PartitionSpec(AXIS, *inner) if fits else PartitionSpec(AXIS)

    def one(node: Any) -> Any:
        if not isinstance(node, LayerArrays):
            return PartitionSpec(AXIS)
        return LayerArrays(
            {p: behind(params.outer[p], 0, x) for p, x in node.outer.items()},
            {n: [behind(params.blocks[n], 3, x) for x in xs] for n, xs in node.blocks.items()},
            jax.tree.map(lambda _: PartitionSpec(AXIS), node.rest),
        )

    return jax.tree.map(one, state, is_leaf=_is_node)


def unstack_state(state: Any, layout: StageLayout) -> Any:
    """An optimizer state as the same optimizer would hold it without a pipeline."""
    mapped = is_mapped(state)

    def one(node: Any) -> Any:
        if isinstance(node, LayerArrays):
            return from_stage_major(_joined(node, layout), layout)
        if isinstance(node, StageMajor):
            return from_stage_major(node, layout)
        return node[0] if mapped else node

    return jax.tree.map(one, state, is_leaf=_is_node)


def stack_state(state: Any, like: Any, layout: StageLayout) -> Any:
    """The inverse of `unstack_state`.

    Args:
        state: the unpipelined state.
        like: abstract state of the pipelined optimizer, of either kind.
        layout: layout of the parameters.
    """
    p, mapped = layout.num_stages, is_mapped(like)
    spread = lambda x: jnp.broadcast_to(x, (p, *jnp.shape(x)))

    def one(node: Any, whole: Any) -> Any:
        if isinstance(node, LayerArrays):
            return _separated(to_stage_major(whole, layout), node, p)
        if isinstance(node, StageMajor):
            return to_stage_major(whole, layout)
        return spread(whole) if mapped else whole

    return jax.tree.map(one, like, state, is_leaf=_is_node)


def _joined(node: LayerArrays, layout: StageLayout) -> StageMajor:
    def join(parts: list[Any]) -> Any:
        if not hasattr(parts[0], "shape"):
            return parts[0]
        stacked = jnp.stack(parts, axis=1)
        shape = (layout.num_stages, layout.virtual_stages, layout.per_chunk)
        return stacked.reshape(*shape, *stacked.shape[2:])

    first = lambda x: x[0] if hasattr(x, "shape") else x
    outer = {path: first(x) for path, x in node.outer.items()}
    return StageMajor(outer, {name: join(parts) for name, parts in node.blocks.items()})


def _separated(tree: StageMajor, like: LayerArrays, p: int) -> LayerArrays:
    """What completes the norm (`rest`) starts from zero: no other update reads its state."""

    def separate(x: Any, parts: list[Any]) -> list[Any]:
        if not hasattr(x, "shape"):
            return list(parts)
        flat = x.reshape(p, -1, *x.shape[3:])
        return [flat[:, n] for n in range(flat.shape[1])]

    spread = lambda x: jnp.broadcast_to(x, (p, *x.shape)) if hasattr(x, "shape") else x
    return LayerArrays(
        {path: spread(x) for path, x in tree.outer.items()},
        {name: separate(x, like.blocks[name]) for name, x in tree.blocks.items()},
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like.rest),
    )
