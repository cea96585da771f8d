"""Where a pipelined model's arrays live: blocks stacked by stage, everything else as it was.

A block's parameter of `L` layers becomes one array `[P, V, L / (P * V), ...]`: stage, virtual
stage, layer within the chunk. Its first dim is sharded over the mesh axis `pipeline`. Checkpoints
keep the model's own layout (`from_stage_major`), so any other number of stages restores them.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.errors import StageSplitError
from shardtrain.pytree import leaves_by_path


@dataclasses.dataclass(frozen=True)
class LayerLeaf:
    """One array of the repeated block: a path per layer, or one path stacked along axis 0."""

    name: str
    paths: tuple[str, ...]
    stacked: bool

    @classmethod
    def of(cls, paths: tuple[str, ...], stacked: bool) -> "LayerLeaf":
        """Named by what the paths have in common: `layers/*/kernel`."""
        return cls(common_name(paths), paths, stacked)


def common_name(paths: tuple[str, ...]) -> str:
    """`layers/*/kernel` for `layers/0/kernel, layers/1/kernel, ...`."""
    split = [re.split(r"(\d+)", path) for path in paths]
    if len({len(parts) for parts in split}) > 1:
        return paths[0]
    return "".join(p[0] if len(set(p)) == 1 else "*" for p in zip(*split, strict=True))


def unique_names(leaves: list[LayerLeaf]) -> dict[tuple[str, ...], LayerLeaf]:
    """Number the leaves that share a name (`layers/*/kernel`, `layers/*/kernel@1`)."""
    count: dict[str, int] = {}
    named = {}
    for leaf in leaves:
        n = count.setdefault(leaf.name, 0)
        named[leaf.paths] = dataclasses.replace(leaf, name=f"{leaf.name}@{n}") if n else leaf
        count[leaf.name] += 1
    return named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageMajor:
    """A tree of arrays in pipeline layout.

    Args:
        outer: path -> array, for leaves outside the blocks.
        blocks: `LayerLeaf.name` -> array `[P, V, layers per chunk, ...]`.
    """

    outer: dict[str, Any]
    blocks: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StageLayout:
    """How a tree maps to `StageMajor`; made by `stage_layout`.

    Args:
        num_stages: P, the size of the mesh axis `pipeline`.
        virtual_stages: V.
        count: L, layers in the pipeline.
        leaves: the blocks' leaves.
        treedef: structure of the original tree.
        paths: its leaf paths, in tree order.
    """

    num_stages: int
    virtual_stages: int
    count: int
    leaves: tuple[LayerLeaf, ...]
    treedef: Any
    paths: tuple[str, ...]

    @property
    def per_chunk(self) -> int:
        """Layers in one chunk."""
        return self.count // (self.num_stages * self.virtual_stages)


def stage_layout(
    tree: Any, leaves: tuple[LayerLeaf, ...], count: int, num_stages: int, virtual_stages: int
) -> StageLayout:
    """The layout of `tree` (params or variables) for `num_stages` stages.

    Raises:
        StageSplitError: the layers are not divisible by the chunks.
    """
    chunks = num_stages * virtual_stages
    if count % chunks:
        raise StageSplitError(
            f"{count} layers are not divisible by {num_stages} stages x {virtual_stages} virtual "
            "stages"
        )
    paths = tuple(leaves_by_path(tree))
    return StageLayout(num_stages, virtual_stages, count, leaves, jax.tree.structure(tree), paths)


def to_stage_major(tree: Any, layout: StageLayout) -> StageMajor:
    """A tree in the model's own layout as `StageMajor`; pure, can be jitted."""
    shape = (layout.virtual_stages, layout.num_stages, layout.per_chunk)

    def stack(parts: list[Any], leaf: LayerLeaf) -> Any:
        if not hasattr(parts[0], "shape"):
            return parts[0]
        layers = parts[0] if leaf.stacked else jnp.stack(parts)
        return layers.reshape(*shape, *layers.shape[1:]).swapaxes(0, 1)

    return _split(tree, layout, stack)


def from_stage_major(tree: StageMajor, layout: StageLayout) -> Any:
    """Back to the model's own layout: the inverse of `to_stage_major`."""

    def unstack(array: Any, leaf: LayerLeaf) -> list[Any]:
        if not hasattr(array, "shape"):
            return [array] * len(leaf.paths)
        layers = array.swapaxes(0, 1).reshape(layout.count, *array.shape[3:])
        return [layers] if leaf.stacked else [layers[n] for n in range(layout.count)]

    return _join(tree, layout, unstack)


def stage_major_specs(specs: Any, layout: StageLayout) -> StageMajor:
    """PartitionSpecs of the model's own layout -> those of its `StageMajor`.

    Raises:
        StageSplitError: layers of one leaf are sharded differently.
    """

    def one(parts: list[PartitionSpec], leaf: LayerLeaf) -> PartitionSpec:
        if len(set(parts)) > 1:
            raise StageSplitError(f"layers of {leaf.name} have different shardings: {set(parts)}")
        inner = tuple(parts[0])[1:] if leaf.stacked else tuple(parts[0])
        return PartitionSpec("pipeline", None, None, *inner)

    return _split(specs, layout, one)


def _split(
    tree: Any, layout: StageLayout, join: Callable[[list[Any], LayerLeaf], Any]
) -> StageMajor:
    # An optimizer that masks leaves puts an empty node in their place: it stays as it is.
    by_path = dict(zip(layout.paths, layout.treedef.flatten_up_to(tree), strict=True))
    blocks = {leaf.name: join([by_path[p] for p in leaf.paths], leaf) for leaf in layout.leaves}
    taken = {p for leaf in layout.leaves for p in leaf.paths}
    return StageMajor({p: x for p, x in by_path.items() if p not in taken}, blocks)


def _join(
    tree: StageMajor, layout: StageLayout, split: Callable[[Any, LayerLeaf], list[Any]]
) -> Any:
    by_path = dict(tree.outer)
    for leaf in layout.leaves:
        by_path.update(zip(leaf.paths, split(tree.blocks[leaf.name], leaf), strict=True))
    return jax.tree.unflatten(layout.treedef, [by_path[p] for p in layout.paths])


def from_stage_major_tree(tree: Any, layout: StageLayout) -> Any:
    """Every `StageMajor` inside a larger tree (an optimizer state) in the model's layout."""
    is_leaf = lambda x: isinstance(x, StageMajor)
    return jax.tree.map(
        lambda x: from_stage_major(x, layout) if is_leaf(x) else x, tree, is_leaf=is_leaf
    )
