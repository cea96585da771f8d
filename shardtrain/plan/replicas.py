"""A plan whose replicas agree in another way than the compiler's own all-reduce."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from shardtrain.errors import CompilerBugError, StrategyError
from shardtrain.partitioning import optimizer_specs
from shardtrain.pipeline.optimizer_state import is_mapped, mapped_specs
from shardtrain.plan.grads import TracedLoss
from shardtrain.plan.known_bugs import check_known_bugs
from shardtrain.plan.layout import Layout
from shardtrain.plan.pipelined import Pipelined
from shardtrain.pytree import map_with_path
from shardtrain.strategy import Strategy
from shardtrain.sync import Algorithm, Job, Replicas, make_algorithm, needs_replicas
from shardtrain.train import (
    GradFn,
    first_microbatch_key,
    over_microbatches,
    value_and_grad,
)


def make_job(layout: Layout, optimizer: optax.GradientTransformation, s: Strategy) -> Job:
    """What the algorithm needs to know of the plan."""
    hosts = s.dcn.get("data", 1)
    return Job(
        replicas=Replicas(layout.mesh, layout.grad_specs, hosts),
        optimizer=optimizer,
        max_grad_norm=s.max_grad_norm,
        state=layout.state,
        batch=layout.batch,
        shard_update=layout.constrain(layout.update_specs),
        optimizer_specs=lambda state, specs: _optimizer_specs(layout, state, specs),
    )


def _optimizer_specs(layout: Layout, abstract_state: Any, specs: Any) -> Any:
    """Specs of an optimizer state whose arrays follow parameters in the given specs."""
    if is_mapped(abstract_state):
        return mapped_specs(abstract_state, specs)
    by_path: dict[str, Any] = {}
    map_with_path(lambda path, spec: by_path.update({path: spec}), specs)
    plans: Mapping[str, Any] = {
        path: dataclasses.replace(plan, full=by_path.get(path, plan.full))
        for path, plan in layout.params.items()
    }
    return optimizer_specs(abstract_state, plans, True)


def replica_gradients(traced: TracedLoss, s: Strategy) -> GradFn:
    """The gradient sums of one replica's rows, over its own microbatches.

    Args:
      traced: The loss; its `proof` is run as it is where replicas are single devices.
      s: Microbatches.

    Raises:
      CompilerBugError: Replicas span several devices, and a convolution cannot be rewritten.
    """
    layout, stored = traced.layout, traced.stored
    others = [a for a, n in layout.sizes.items() if n > 1 and a != "data"]
    if others:
        bugs = check_known_bugs(traced.proof, layout, s)
        if reason := bugs.why_not_mapped(kernels=True):
            raise CompilerBugError(
                f"{reason}: it would get wrong kernel gradients where replicas are split over "
                f"{', '.join(others)} (XLA). With sync= or compression= use the data axis alone "
                "for this model"
            )
        loss = bugs.avoid_mapped(traced.loss_for(("data",)), kernels=True)
    else:
        loss = traced.proof  # each device runs a replica as plain code: nothing to constrain
    grad_fn = value_and_grad(traced.finish(loss))
    if s.num_microbatches > 1:
        inner = stored.constrain(stored.grad_specs) if others else lambda grads: grads
        return over_microbatches(grad_fn, s.num_microbatches, inner)
    return first_microbatch_key(grad_fn)


def refuse_verify(strategy: Strategy) -> None:
    """`st.verify` compares one step with one device, which only exact all-reduce equals.

    Raises:
      StrategyError: The strategy's replicas do other arithmetic by design.
    """
    raise StrategyError(
        f"st.verify compares with one device, and {strategy} is not the same arithmetic by design. "
        "Verify the plan with sync=None, compression=None; the replicas' own code is the same"
    )


def with_replicas(
    s: Strategy,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    pipelined: Pipelined | None,
) -> tuple[Algorithm | None, Layout, Pipelined | None]:
    """The algorithm by which replicas agree, and the plan's layout with what they keep.

    Args:
      s: Its `sync` and `compression`.
      layout: Shardings without replica-local arrays.
      optimizer: In the form the layout's parameters have.
      pipelined: The split model, if stages are.
    """
    if not needs_replicas(s):
        return None, layout, pipelined
    algorithm = make_algorithm(s, make_job(layout, optimizer, s))
    layout = dataclasses.replace(layout, state=algorithm.state)
    if pipelined is not None:
        pipelined = dataclasses.replace(pipelined, layout=layout)
    return algorithm, layout, pipelined
