"""Whether a plan runs the model's layers as one loop, and how its arrays then meet that loop.

Design: as for a pipeline, the plan is first made for the model's own layout. Layers that are
modules of their own are then stored stacked (`StageMajor` with one stage), so that nothing in the
program depends on their number. A model that scans already keeps its layout; only its parameters
are gathered inside its loop, not before it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from shardtrain.errors import StageSplitError
from shardtrain.modules import ModelForm
from shardtrain.modules.intercept import remat_policy
from shardtrain.pipeline import StageLayout, StageMajor, make_pipeline, make_schedule
from shardtrain.pipeline.markers import BlockGroup, find_groups, marked
from shardtrain.pipeline.optimizer import pipelined_optimizer
from shardtrain.pipeline.scanned import Gathers, Storage, scan_layers
from shardtrain.plan.gather import gather_at_use
from shardtrain.plan.layout import Layout
from shardtrain.plan.loss import UserLoss, make_loss
from shardtrain.plan.pipelined import Pipelined, stacked_layout
from shardtrain.plan.stream import constrain_stream
from shardtrain.pytree import leaves_by_path, map_with_path
from shardtrain.strategy import Strategy
from shardtrain.train import LossFn

# From so many layers on, compiling them one by one takes longer than all else.
FEWEST_LAYERS = 8
FEWEST_TURNS = 4


@dataclasses.dataclass(frozen=True)
class LayerScan:
    """A plan's loop over layers.

    Args:
      form: The model in its own layout.
      whole: Its shardings there.
      group: The modules that are the layers; None: the model has a scan of its own.
      stacked: The layout of stacked layers; None where the model's own arrays are.
      note: What was found, for people.
    """

    form: ModelForm
    whole: Layout
    group: BlockGroup | None
    stacked: Pipelined | None
    note: str

    def marked(self, loss: UserLoss) -> UserLoss:
        """The user's loss with its layers marked."""
        return dataclasses.replace(loss, fn=marked(loss.fn, self.form.kind, self.group))

    def run(self, loss: LossFn, strategy: Strategy, fallback: LossFn | None = None) -> LossFn:
        """A marked loss for the model's own layout -> the loss for the stored arrays.

        Args:
          loss: From `marked`.
          strategy: Precision, and whether parameters are stored in shards.
          fallback: For stored arrays, where `loss` has no layers to scan; None: refused.
        """
        form = self.form
        if self.stacked is None:
            storage = _own, _own
        else:
            pipeline = self.stacked.pipeline
            storage = _stacked(pipeline.params), _stacked(pipeline.variables)
        own = form.abstract_params, form.abstract_variables
        return scan_layers(
            loss,
            own,
            self.group,
            *storage,
            gathers=self._gathers(strategy),
            remat=self._remat(strategy),
            fallback=fallback,
        )

    def _remat(self, s: Strategy) -> dict[str, Any] | None:
        """A model whose layers are modules says itself which calls are recomputed."""
        if self.form.blocks or s.remat == "none":
            return None
        return {"policy": remat_policy(s.remat)}

    def _gathers(self, s: Strategy) -> Gathers | None:
        whole = self.whole
        if s.zero < 3 or whole.sizes["fsdp"] == 1:
            return None
        compute, full = leaves_by_path(whole.compute_specs), leaves_by_path(whole.full_specs)
        own = leaves_by_path(self.form.abstract_params)
        one = lambda c, f, x: gather_at_use(whole.mesh, [c], [f])([x])[0]

        def outer(path: str, x: Any) -> Any:
            narrow = s.precision == "bf16" and x.dtype == jnp.float32
            found = one(compute[path], full[path], x.astype(jnp.bfloat16) if narrow else x)
            return found.astype(x.dtype)

        def layer(paths: tuple[str, ...], x: Any) -> Any:
            c, f = compute[paths[0]], full[paths[0]]
            if len(own[paths[0]].shape) > x.ndim:
                c, f = PartitionSpec(*c[1:]), PartitionSpec(*f[1:])
            return one(c, f, x)

        return Gathers(outer, layer)


def find_layer_scan(
    form: ModelForm,
    loss: UserLoss,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    s: Strategy,
) -> tuple[LayerScan | None, str]:
    """The loop over a model's layers that a strategy asks for, or that pays.

    Args:
      form: The model.
      loss: The user's loss.
      optimizer: The user's optimizer.
      layout: Shardings in the model's own layout.
      s: `scan_layers`: True, False, or None: from `FEWEST_LAYERS` layers on, and for a model with a
        scan of its own whose parameters are stored in shards.

    Returns:
      The loop or None, and why not where there might have been one.

    Raises:
      StageSplitError: `scan_layers=True` and no repeated block; says what was looked for.
    """
    groups = _worth_it(form, layout, s)
    if groups is None:
        return None, ""
    try:
        return _split(form, loss, optimizer, layout, s, groups), ""
    except StageSplitError as error:
        if s.scan_layers:
            raise
        return None, f"layers are compiled one by one, not as a loop: {error}" if groups else ""


def _worth_it(form: ModelForm, layout: Layout, s: Strategy) -> list[BlockGroup] | None:
    """The groups of modules to look at; None: leave the model as it is."""
    if s.scan_layers is False or form.base is not None:
        return None
    groups = [] if form.kind == "functional" else find_groups(form.abstract_params)
    if s.scan_layers:
        return groups
    many = [g for g in groups if len(g.paths) >= FEWEST_LAYERS]
    in_shards = s.zero == 3 and layout.sizes["fsdp"] > 1
    return many if many or (in_shards and not form.blocks) else None


def _split(
    form: ModelForm,
    loss: UserLoss,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    s: Strategy,
    groups: list[BlockGroup],
) -> LayerScan:
    # A model without separate blocks is a scan: rematerialising the whole loss would hide it.
    visible = s if form.blocks else s.replace(remat="none")

    def make(fn: Callable[..., Any]) -> LossFn:
        given = dataclasses.replace(loss, fn=fn)
        return constrain_stream(
            make_loss(form, given, visible, layout.mesh, num_parts=s.num_microbatches),
            layout,
            s,
            (),
        )

    schedule = make_schedule("gpipe", 1, s.num_microbatches)
    pipeline = make_pipeline(
        form, make, loss.fn, layout.batch, schedule, s.rules.get("pipeline"), groups
    )
    count, group = pipeline.model.count, pipeline.model.group
    note = f"{_loop_note(pipeline.model.note)}: compiled once, as a loop over {count}"
    if count < (2 if s.scan_layers else FEWEST_TURNS):
        raise StageSplitError(f"layers are too unlike each other: a loop would turn {count} times")
    if group is None and all(leaf.stacked for leaf in pipeline.model.params):
        _refuse_sharded_layers(layout, pipeline.params)
        return LayerScan(form, layout, None, None, note)
    stacked = pipelined_optimizer(optimizer, form.abstract_params, pipeline.params)
    found = Pipelined(pipeline, stacked_layout(layout, pipeline, stacked, s), stacked, layout)
    return LayerScan(form, layout, group, found, note)


def _loop_note(note: str) -> str:
    return note.replace(" run before the pipeline, on every stage", " run before the loop")


def _refuse_sharded_layers(layout: Layout, params: StageLayout) -> None:
    full = leaves_by_path(layout.full_specs)
    for leaf in params.leaves:
        spec = full[leaf.paths[0]]
        if len(spec) and spec[0] is not None:
            raise StageSplitError(f"the layers' dim of {leaf.paths[0]} is sharded: {spec}")


def _read_own(
    tree: Any, outer: tuple[str, ...], blocks: list[tuple[str, ...]]
) -> tuple[list[Any], list[Any]]:
    by_path = leaves_by_path(tree)
    return [by_path[p] for p in outer], [by_path[paths[0]] for paths in blocks]


def _write_own(tree: Any, outer: dict[str, Any], blocks: dict[tuple[str, ...], Any]) -> Any:
    new = outer | {paths[0]: x for paths, x in blocks.items()}
    return map_with_path(lambda path, x: new.get(path, x), tree)


_own = Storage(_read_own, _write_own)


def _stacked(layout: StageLayout) -> Storage:
    names = {leaf.paths: leaf.name for leaf in layout.leaves}

    def read(
        tree: StageMajor, outer: tuple[str, ...], blocks: list[tuple[str, ...]]
    ) -> tuple[list[Any], list[Any]]:
        return [tree.outer[p] for p in outer], [tree.blocks[names[b]][0, 0] for b in blocks]

    def write(
        tree: StageMajor, outer: dict[str, Any], blocks: dict[tuple[str, ...], Any]
    ) -> StageMajor:
        new = {names[b]: x[None, None] for b, x in blocks.items()}
        return StageMajor(tree.outer | outer, tree.blocks | new)

    return Storage(read, write)
