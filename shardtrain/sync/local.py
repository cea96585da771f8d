"""One step of every replica on its own: the inner loop of local SGD, DiLoCo and gossip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from shardtrain.errors import StrategyError
from shardtrain.modules.losses import LossOutput
from shardtrain.sync.algorithm import Job
from shardtrain.sync.gradients import own_keys, own_rows, split_rows
from shardtrain.sync.replicas import AXIS, broadcast, map_replicas
from shardtrain.train import GradFn, clip, global_norm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalStep:
    """What the replicas did, everything with a leading replica dim.

    Args:
      copies: Their parameters, optimizer states and variables, as in `first_copies`.
      output: Sums of loss, weight and metrics over their rows.
      norm: Of their mean gradients, before clipping.
      taken: Whether the step was finite; where not, nothing of that replica changed.
    """

    copies: dict[str, Any]
    output: LossOutput
    norm: jax.Array
    taken: jax.Array


def first_copies(job: Job, params: Any, variables: Any) -> dict[str, Any]:
    """Every replica's parameters, optimizer state and variables: alike but for random keys."""
    count = job.replicas.count
    every = lambda index: own_keys(variables, index)
    return {
        "params": broadcast(params, count),
        "opt_state": broadcast(job.optimizer.init(params), count),
        "variables": jax.vmap(every)(jnp.arange(count)),
    }


def copies_specs(job: Job) -> dict[str, Any]:
    """Specs of `first_copies`: over `data`, and inside a replica as without replicas."""
    stacked = lambda tree: jax.tree.map(lambda x: PartitionSpec(AXIS, *x.sharding.spec), tree)
    state = job.state
    return {
        "params": stacked(state.params),
        "opt_state": stacked(state.opt_state),
        "variables": stacked(state.variables),
    }


def per_replica_numbers(name: str, given: Sequence[float] | float, count: int) -> np.ndarray:
    """One number per replica.

    Raises:
      StrategyError: There are more or fewer than replicas.
    """
    if isinstance(given, int | float):
        return np.full((count,), given, np.float32)
    if len(given) != count:
        raise StrategyError(f"{name} has {len(given)} numbers for {count} replicas (data={count})")
    return np.asarray(given, np.float32)


def make_local_step(
    grad_fn: GradFn,
    job: Job,
    learning_rates: Sequence[float] = (),
    proximal: Sequence[float] | float = 0.0,
) -> Callable[..., LocalStep]:
    """`(copies, anchor, batch, key) -> LocalStep`: nothing is communicated.

    Args:
      grad_fn: Gradient sums of one replica's rows.
      job: The plan's parts.
      learning_rates: A factor on each replica's updates; (): 1.
      proximal: Pull towards the anchor, one number or one per replica.
    """
    replicas = job.replicas
    rates = per_replica_numbers("learning_rates", learning_rates or 1.0, replicas.count)
    pulls = per_replica_numbers("proximal", proximal, replicas.count)
    pulled = bool(np.any(pulls))
    shard = (lambda tree: tree) if replicas.alone else job.shard_update
    update = optax.with_extra_args_support(job.optimizer).update
    rows = own_rows(job.batch)

    def one(
        index: jax.Array, copy: Any, anchor: Any, part: Any, key: jax.Array, rate: Any, pull: Any
    ) -> LocalStep:
        params, opt_state = copy["params"], copy["opt_state"]
        found = grad_fn(params, copy["variables"], part, jax.random.fold_in(key, index))
        loss = found.output.loss
        grads = jax.tree.map(lambda g: (g / loss.weight).astype(g.dtype), found.grads)
        if pulled:
            grads = jax.tree.map(lambda g, p, a: g + pull * (p - a), grads, params, anchor)
        norm = global_norm(grads)
        if job.max_grad_norm is not None:
            grads = clip(grads, norm, job.max_grad_norm)
        taken = jnp.isfinite(norm) & jnp.isfinite(loss.total / loss.weight)
        whole = shard(params)
        updates, new_state = update(shard(grads), opt_state, whole, value=loss.value)
        if learning_rates:
            updates = jax.tree.map(lambda u: (u * rate).astype(u.dtype), updates)
        new = {
            "params": optax.apply_updates(whole, updates),
            "opt_state": new_state,
            "variables": found.variables,
        }
        kept = jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, copy)
        return LocalStep(kept, found.output, norm, taken)

    mapped = map_replicas(one, replicas, (True, False, rows, False, True, True))

    def step(copies: Any, anchor: Any, batch: Any, key: jax.Array) -> LocalStep:
        parts = split_rows(batch, replicas.count, rows)
        return mapped(copies, anchor, parts, key, rates, pulls)

    return step


def local_metrics(found: LocalStep) -> tuple[LossOutput, dict[str, jax.Array]]:
    """Sums over the replicas, and the step's own metrics.

    `grad_norm` is the root mean square over replicas; `skipped` is 1 when some replica that had
    examples did not take its step.
    """
    output = jax.tree.map(lambda x: jnp.sum(x, axis=0), found.output)
    squares = jnp.where(found.taken, jnp.square(found.norm), 0.0)
    bad = jnp.any(~found.taken & (found.output.loss.weight > 0)) | (output.loss.weight == 0)
    norm = jnp.sqrt(jnp.sum(squares) / jnp.maximum(jnp.sum(found.taken), 1))
    return output, {"grad_norm": norm, "skipped": bad.astype(jnp.int32)}


def once_known(due: jax.Array, values: Any) -> jax.Array:
    """`due`, but not before these scalars are there: one collective after the other.

    XLA on CPU runs the branch of a conditional beside independent operations. Devices that first
    met the branch's collective would then wait for ever for those that first met another. An
    optimization barrier is gone when the program is scheduled; a predicate that needs them is not.
    """
    total = sum((x.astype(jnp.float32) for x in jax.tree.leaves(values)), jnp.float32(0))
    return due & (total != jnp.float32(-1.7e38))
