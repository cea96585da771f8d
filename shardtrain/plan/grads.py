"""Which gradient function a plan runs: composed from the wrappers of `train.gradients`.

Design: where a loss is proven to be a sum over examples, each replica adds up its own gradients
and they are reduced once per step. Where it is not (batch statistics), the partitioner reduces
within each microbatch, which is always right. Either way the sums are float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.errors import LossContractError
from shardtrain.partitioning.infer.independence import Independence, batch_independence
from shardtrain.plan.draws import draw_for_batch, hidden_draw
from shardtrain.plan.known_bugs import KnownBugs, check_known_bugs
from shardtrain.plan.layout import Layout
from shardtrain.strategy import Strategy
from shardtrain.train import (
    GradFn,
    LossFn,
    first_microbatch_key,
    over_microbatches,
    per_replica,
    split_batch,
    sum_replicas,
    value_and_grad,
)


@dataclass(frozen=True)
class GradientPlan:
    """The gradient function, and how often it communicates.

    Args:
      grad_fn: Sums over the global batch.
      local_axes: Batch axes over which gradients are reduced once per step.
      reason: Why not once, where they are reduced within each microbatch.
    """

    grad_fn: GradFn
    local_axes: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class TracedLoss:
    """A plan's loss before it is differentiated.

    Args:
      loss_for: The loss in the plan's layout, given the batch axes that are split off.
      proof: The same loss without sharding constraints.
      layout: Shardings of its arguments.
      stored: Shardings of what is differentiated: another layout where layers are stacked.
      finish: From the loss of `layout` to that of `stored`.
    """

    loss_for: Callable[[tuple[str, ...]], LossFn]
    proof: LossFn
    layout: Layout
    stored: Layout
    finish: Callable[[LossFn], LossFn]


def make_gradients(traced: TracedLoss, s: Strategy) -> GradientPlan:
    """Compose the gradient function of a strategy.

    Args:
      traced: The loss.
      s: Microbatches, ZeRO level and precision.
    """
    proof_loss, layout, stored = traced.proof, traced.layout, traced.stored
    many = s.num_microbatches > 1
    axes = _local_axes(layout, s)
    reason = ""
    bugs = KnownBugs()
    if not many:
        axes = ()
    if any(n > 1 for n in layout.sizes.values()):
        bugs = check_known_bugs(proof_loss, layout, s)
    if axes:
        reason = _why_not_per_replica(proof_loss, layout, s, bugs)
        axes = () if reason else axes
    if many and not s.equal_microbatches:
        _refuse_constant_weight(proof_loss, layout, s.num_microbatches)
    loss = traced.loss_for(axes)
    if axes:
        loss = draw_for_batch(loss, math.prod(layout.sizes[a] for a in axes))
    loss = traced.finish(bugs.avoid_mapped(loss) if axes else bugs.avoid(loss))
    grad_fn = value_and_grad(loss, float32_sums=s.precision == "bf16")
    constrain = stored.constrain(stored.grad_specs)
    if axes:
        replicas = math.prod(layout.sizes[a] for a in axes)
        grad_fn = per_replica(grad_fn, replicas, axes)
        inner = stored.constrain(stored.grad_specs, leading=axes)
    else:
        inner = constrain
    if many:
        grad_fn = over_microbatches(grad_fn, s.num_microbatches, inner)
    else:
        grad_fn = first_microbatch_key(grad_fn)
    if axes:
        grad_fn = sum_replicas(grad_fn, constrain)
    return GradientPlan(grad_fn, axes, reason)


def _refuse_constant_weight(loss: LossFn, layout: Layout, parts: int) -> None:
    """A weight written as a number is that of the whole batch, and would be counted once per part.

    Raises:
      LossContractError: The weight of a microbatch is the same number as that of the batch.
    """
    state = layout.state
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    whole = plain(layout.batch)
    split = jax.eval_shape(lambda b: split_batch(b, parts), whole)
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), split)

    def constant(batch: Any) -> float | None:
        weight = lambda p, v, b, k: loss(p, v, b, k)[0].loss.weight
        traced = jax.make_jaxpr(weight)(
            plain(state.params), plain(state.variables), batch, plain(state.rng)
        )
        made = {v: eqn for eqn in traced.jaxpr.eqns for v in eqn.outvars}
        (out,) = traced.jaxpr.outvars
        while not isinstance(out, jex.Literal):  # back through casts and `stop_gradient`
            if out not in made or len(made[out].invars) != 1:
                return None
            (out,) = made[out].invars
        return float(out.val)

    found = constant(part)
    if found is not None and found == constant(whole):
        raise LossContractError(
            f"loss_fn returned st.Mean with weight {found:g} for a microbatch as for the whole "
            f"batch, so {parts} microbatches would weigh {parts} times as much. Compute the weight "
            "from the batch it is given, e.g. jnp.sum(mask) or x.shape[0]; or pass "
            "Strategy(equal_microbatches=True) if the total is a mean of each microbatch"
        )


def pipeline_axes(
    loss: LossFn, layout: Layout, s: Strategy, bugs: KnownBugs
) -> tuple[tuple[str, ...], str]:
    """Batch axes over which a pipeline reduces once per step, and why not over all of them."""
    axes = _local_axes(layout, s)
    if not axes:
        return (), ""
    if bugs.convolutions:
        line = bugs.convolutions[0].line
        reason = f"convolution gradients are not mapped over pipelines ({line})"
    else:
        reason = _why_not_per_replica(loss, layout, s, bugs)
    return ((), reason) if reason else (axes, "")


def _why_not_per_replica(loss: LossFn, layout: Layout, s: Strategy, bugs: KnownBugs) -> str:
    if reason := bugs.why_not_mapped():
        return reason
    proof = prove_sum_over_examples(loss, layout, s)
    if proof.ok:
        return ""
    return f"{proof.reason}{f' ({proof.source})' if proof.source else ''}"


def _local_axes(layout: Layout, s: Strategy) -> tuple[str, ...]:
    """Sharded gradients (ZeRO 2, 3) leave over fsdp as they are made; the rest waits.

    Rows are laid out axis by axis, so only the leading axes can be split off without moving rows.
    Tokens travel over `expert`, which no replica on its own could do.
    """
    axes = layout.batch_axes
    kept = [a for a in axes if a == "expert" or (a == "fsdp" and s.zero >= 2)]
    return axes[: axes.index(kept[0])] if kept else axes


def prove_sum_over_examples(loss: LossFn, layout: Layout, s: Strategy) -> Independence:
    """Whether one microbatch's sums can be computed per replica and added.

    Args:
      loss: The loss without sharding constraints.
      layout: Shapes.
      s: Microbatches, ZeRO level.
    """
    state = layout.state
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def sums(params: Any, batch: Any, variables: Any, key: jax.Array) -> Any:
        output, _ = loss(params, variables, batch, key)
        return output

    microbatch = plain(layout.batch)
    if s.num_microbatches > 1:
        split = jax.eval_shape(lambda b: split_batch(b, s.num_microbatches), microbatch)
        microbatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), split)
    params, variables, key = plain(state.params), plain(state.variables), plain(state.rng)
    changed = _changed_variables(loss, params, variables, microbatch)
    if changed:
        return Independence(False, f"the model updates its variables ({changed})", "")
    parts = math.prod(layout.sizes[a] for a in _local_axes(layout, s))
    # Draws for the whole batch are made for the whole batch (`draw_for_batch`).
    found = batch_independence(
        sums, params, microbatch, variables, key, parts=parts, ignore_random=True
    )
    if found.ok:
        rows = lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)
        own = jax.tree.map(rows, microbatch)
        if reason := hidden_draw(loss, parts, params, variables, own, key):
            return Independence(False, reason, "")
    return found


def _changed_variables(loss: LossFn, params: Any, variables: Any, batch: Any) -> str:
    """Floating-point variables that the call rewrites, e.g. batch statistics."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr, (_, new) = jax.make_jaxpr(lambda p, v, b, k: loss(p, v, b, k), return_shape=True)(
        params, variables, batch, key
    )
    flat = jax.tree_util.tree_leaves_with_path(new)
    outputs = jaxpr.jaxpr.outvars[len(jaxpr.jaxpr.outvars) - len(flat) :]
    inputs = set(map(id, jaxpr.jaxpr.invars))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, leaf), var in zip(flat, outputs, strict=True)
        if id(var) not in inputs and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
    ]
    return ", ".join(names[:3])
