"""A plan whose layers are split over pipeline stages.

Design: the plan is first made as if there were no pipeline, so every rule, annotation and check
sees the model's own paths. Then the blocks' arrays are stacked by stage (`StageMajor`), their specs
with them, and the gradient function is the pipeline's. Checkpoints keep the unstacked form.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import CompilerBugError
from shardtrain.modules import ModelForm
from shardtrain.partitioning import LeafPlan, optimizer_specs
from shardtrain.pipeline import (
    Pipeline,
    StageLayout,
    StageMajor,
    from_stage_major,
    make_pipeline,
    make_pipeline_grad,
    make_schedule,
    stage_major_specs,
    to_stage_major,
)
from shardtrain.pipeline.optimizer import pipelined_optimizer
from shardtrain.pipeline.optimizer_state import is_mapped, mapped_specs, stack_state, unstack_state
from shardtrain.plan.draws import draw_for_batch
from shardtrain.plan.gather import gather_at_use
from shardtrain.plan.grads import pipeline_axes
from shardtrain.plan.known_bugs import check_known_bugs
from shardtrain.plan.layout import Layout
from shardtrain.plan.loss import UserLoss, make_loss
from shardtrain.plan.stream import constrain_stream, stream_findings
from shardtrain.pytree import map_with_path, nbytes
from shardtrain.strategy import Strategy
from shardtrain.sync import needs_replicas
from shardtrain.train import GradFn, LossFn, TrainState, per_replica, sum_replicas


@dataclass(frozen=True)
class Pipelined:
    """A model split into stages, and its arrays' layout.

    Args:
      pipeline: The split.
      layout: Shardings of the stacked arrays.
      optimizer: The user's optimizer for stacked arrays: the same update.
      whole: The layout as if there were no pipeline: what checkpoints look like.
      local_axes: Batch axes over which every replica runs its own pipeline, and gradients are
        reduced once per step.
      reason: Why not over all of them, where they are reduced in every tick.
      findings: What of the strategy does not reach this model.
    """

    pipeline: Pipeline
    layout: Layout
    optimizer: optax.GradientTransformation
    whole: Layout
    local_axes: tuple[str, ...] = ()
    reason: str = ""
    findings: tuple[str, ...] = ()

    @property
    def form(self) -> ModelForm:
        """The model with stacked arrays."""
        return self.pipeline.form

    def stack_params(self, params: Any) -> StageMajor:
        """A params-shaped tree in the model's own layout, stacked by stage."""
        return to_stage_major(params, self.pipeline.params)

    def unstack_params(self, params: StageMajor) -> Any:
        """The inverse of `stack_params`."""
        return from_stage_major(params, self.pipeline.params)

    def stack_variables(self, variables: Any) -> StageMajor:
        """A variables-shaped tree in the model's own layout, stacked by stage."""
        return to_stage_major(variables, self.pipeline.variables)

    def unstack(self, state: TrainState) -> TrainState:
        """The state as a plan without pipeline would hold it."""
        return state.replace(
            params=self.unstack_params(state.params),
            opt_state=unstack_state(state.opt_state, self.pipeline.params),
            variables=from_stage_major(state.variables, self.pipeline.variables),
        )

    def stack(self, state: TrainState) -> TrainState:
        """The inverse of `unstack`."""
        like = self.layout.state.opt_state
        return state.replace(
            params=self.stack_params(state.params),
            opt_state=stack_state(state.opt_state, like, self.pipeline.params),
            variables=self.stack_variables(state.variables),
        )

    @property
    def abstract_unstacked(self) -> TrainState:
        """Shapes and shardings of the unstacked state."""
        shapes = jax.eval_shape(self.unstack, self.layout.state)
        known = {
            p: x.sharding
            for p, x in jax.tree_util.tree_leaves_with_path(
                self.whole.state.replace(sync=self.layout.state.sync)
            )
            if hasattr(x, "sharding")
        }
        whole = NamedSharding(self.layout.mesh, PartitionSpec())
        return jax.tree_util.tree_map_with_path(
            lambda p, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=known.get(p, whole)),
            shapes,
        )


def make_pipelined(
    form: ModelForm,
    loss: UserLoss,
    optimizer: optax.GradientTransformation,
    whole: Layout,
    s: Strategy,
) -> Pipelined:
    """Split a model into the strategy's stages.

    Args:
      form: The model.
      loss: The user's loss.
      optimizer: The user's optimizer.
      whole: The layout without pipeline.
      s: Stages, schedule, microbatches.

    Raises:
      StageSplitError: There is no repeated block, or it does not divide; says what was looked for.
      ScheduleError: The schedule is unknown or does not fit.
    """
    # A model without separate blocks is a scan: rematerialising the whole loss would hide it.
    visible = s if form.blocks else s.replace(remat="none")
    plain = lambda fn: make_loss(
        form, dataclasses.replace(loss, fn=fn), visible, None, num_parts=s.num_microbatches
    )
    bugs = check_known_bugs(plain(loss.fn), whole, s)
    if bugs.grouped and bugs.idle_axes:
        raise CompilerBugError(
            f"the grouped convolution at {bugs.grouped[0].line} would get wrong kernel gradients "
            f"in a pipeline on this mesh (XLA; idle axes {', '.join(bugs.idle_axes)}). "
            "Use pipeline=1"
        )
    if needs_replicas(s):
        axes, reason = ("data",), ""  # by definition of the algorithm
    else:
        axes, reason = pipeline_axes(plain(loss.fn), whole, s, bugs)
    replicas = math.prod(whole.sizes[a] for a in axes)
    rows = lambda x: jax.ShapeDtypeStruct((x.shape[0] // replicas, *x.shape[1:]), x.dtype)
    schedule = make_schedule(s.schedule, s.pipeline, s.num_microbatches, s.virtual_stages)
    on_mesh = lambda fn: make_loss(
        form,
        dataclasses.replace(loss, fn=fn),
        visible,
        whole.mesh,
        num_parts=s.num_microbatches,
        local_axes=axes,
    )

    def make(fn: Callable[..., Any]) -> LossFn:
        placed = constrain_stream(on_mesh(fn), whole, s, axes)
        # Replicas that are algorithms of their own draw for themselves.
        drawn = axes and not needs_replicas(s)
        return draw_for_batch(placed, replicas, staged=True) if drawn else placed

    pipeline = make_pipeline(
        form, make, loss.fn, jax.tree.map(rows, whole.batch), schedule, s.rules.get("pipeline")
    )
    stacked = pipelined_optimizer(optimizer, form.abstract_params, pipeline.params)
    layout = stacked_layout(whole, pipeline, stacked, s)
    findings = stream_findings(plain(loss.fn), whole) if s.sequence_parallel else ()
    return Pipelined(pipeline, layout, stacked, whole, axes, reason, findings)


def pipeline_gradients(found: Pipelined, s: Strategy) -> GradFn:
    """The gradient function of the split model, for the batch of one group of `local_axes`."""
    layout, pipeline = found.layout, found.pipeline
    names = [leaf.name for leaf in pipeline.model.params]
    chunk = lambda spec: PartitionSpec(spec[0], *spec[2:])
    options: dict[str, Any] = {}
    if s.zero == 3 and layout.sizes["fsdp"] > 1:
        compute = [chunk(layout.compute_specs.blocks[n]) for n in names]
        full = [chunk(layout.full_specs.blocks[n]) for n in names]
        options["gather"] = gather_at_use(layout.mesh, compute, full)
    return make_pipeline_grad(
        pipeline.model,
        pipeline.schedule,
        layout.mesh,
        pipeline.params,
        batch_axes=tuple(a for a in layout.batch_axes if a not in found.local_axes),
        constrain=layout.constrain(layout.grad_specs),
        **options,
    )


def reduced_once(grad_fn: GradFn, found: Pipelined) -> GradFn:
    """Every replica's pipeline on its own rows, and one reduction behind them."""
    layout, axes = found.layout, found.local_axes
    if not axes:
        return grad_fn
    replicas = math.prod(layout.sizes[a] for a in axes)
    return sum_replicas(per_replica(grad_fn, replicas, axes), layout.constrain(layout.grad_specs))


def stacked_layout(
    whole: Layout, pipeline: Pipeline, optimizer: optax.GradientTransformation, s: Strategy
) -> Layout:
    """The shardings of stacked arrays, from those of the model's own."""
    mesh, form = whole.mesh, pipeline.form
    stack = lambda specs: _padded(stage_major_specs(specs, pipeline.params), form.abstract_params)
    compute, full = stack(whole.compute_specs), stack(whole.full_specs)
    params = _leaf_plans(whole.params, form.abstract_params, pipeline.params, compute, full)
    others = _variable_specs(whole, pipeline)
    variables = _leaf_plans(
        whole.variables, form.abstract_variables, pipeline.variables, others, others
    )
    abstract_opt = jax.eval_shape(optimizer.init, form.abstract_params)
    if is_mapped(abstract_opt):
        opt_specs = mapped_specs(abstract_opt, full if s.zero >= 1 else compute)
    else:
        opt_specs = optimizer_specs(abstract_opt, params, s.zero >= 1)
    shard = lambda tree, specs: jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs,
    )
    state = whole.state.replace(
        params=shard(form.abstract_params, full if s.zero == 3 else compute),
        opt_state=shard(abstract_opt, opt_specs),
        variables=shard(form.abstract_variables, others),
    )
    return dataclasses.replace(
        whole,
        params=params,
        variables=variables,
        state=state,
        update_specs=full if s.zero >= 1 else compute,
        grad_specs=full if s.zero >= 2 else compute,
        compute_specs=compute,
        full_specs=full,
    )


def _variable_specs(whole: Layout, pipeline: Pipeline) -> StageMajor:
    specs = jax.tree.map(lambda x: x.sharding.spec, whole.state.variables)
    stacked = stage_major_specs(specs, pipeline.variables)
    return _padded(stacked, pipeline.form.abstract_variables)


def _padded(specs: StageMajor, like: StageMajor) -> StageMajor:
    """Specs with one entry per dim, so that dims can be dropped from them."""
    one = lambda spec, x: PartitionSpec(*spec, *[None] * (len(x.shape) - len(spec)))
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree.map(one, specs, like, is_leaf=is_spec)


def _leaf_plans(
    plans: Mapping[str, LeafPlan],
    abstract: StageMajor,
    layout: StageLayout,
    compute: StageMajor,
    full: StageMajor,
) -> dict[str, LeafPlan]:
    """The plans of stacked arrays, from those of the first layer of each stack."""
    first = {f"blocks/{leaf.name}": leaf for leaf in layout.leaves}
    found: dict[str, LeafPlan] = {}

    def add(path: str, leaf: Any, compute: PartitionSpec, full: PartitionSpec) -> None:
        block = first.get(path)
        plan = plans[block.paths[0] if block is not None else path.removeprefix("outer/")]
        names, why = plan.logical, plan.why
        if block is not None:
            inner = names[1:] if block.stacked else names
            names = ("stage", "virtual_stage", "layers", *inner)
            over = f" over {layout.num_stages} stages" if layout.num_stages > 1 else " in one loop"
            why = f"{layout.count} layers{over}; {why}"
        found[path] = dataclasses.replace(
            plan,
            path=path,
            shape=tuple(leaf.shape),
            logical=names,
            compute=compute,
            full=full,
            why=why,
            nbytes=nbytes(leaf),
        )

    map_with_path(add, abstract, compute, full)
    return found
