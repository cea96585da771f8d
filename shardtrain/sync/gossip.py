"""Gossip: each replica averages its parameters with its neighbours on a ring."""

from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.algorithms import Gossip
from shardtrain.sync.algorithm import Algorithm, Job
from shardtrain.sync.averaging import agree_on_variables
from shardtrain.sync.local import (
    copies_specs,
    first_copies,
    local_metrics,
    make_local_step,
    once_known,
)
from shardtrain.sync.replicas import AXIS, Replicas, ReplicaState
from shardtrain.train import GradFn, Step, TrainState, step_metrics


def gossip(sync: Gossip, job: Job) -> Algorithm:
    """The algorithm. The mixing matrix is doubly stochastic: the mean of all replicas is kept.

    Args:
      sync: How often.
      job: The plan's parts.
    """

    def init(params: Any, variables: Any) -> tuple[Any, ReplicaState]:
        return (), ReplicaState(copies=first_copies(job, params, variables))

    _, memory = jax.eval_shape(init, job.params, job.state.variables)
    specs = ReplicaState(copies=copies_specs(job))
    state = job.state.replace(opt_state=(), sync=job.sharded(memory, specs))

    def make_step(grad_fn: GradFn) -> Step:
        local = make_local_step(grad_fn, job)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            key = jax.random.fold_in(state.rng, state.step)
            found = local(state.sync.copies, state.params, batch, key)
            output, metrics = local_metrics(found)
            done = state.step + 1

            def mix(params: Any) -> Any:
                with jax.named_scope(f"every_{sync.sync_every}_steps"):
                    return mix_neighbours(params, job.replicas)

            due = once_known(done % sync.sync_every == 0, (output, metrics))
            params = jax.lax.cond(due, mix, lambda p: p, found.copies["params"])
            new = state.replace(
                step=done,
                skipped=state.skipped + metrics["skipped"],
                sync=ReplicaState(copies=found.copies | {"params": params}),
            )
            return new, step_metrics(output) | metrics

        return step

    def agreed(state: TrainState) -> TrainState:
        mean = lambda x: jnp.mean(x.astype(jnp.float32), axis=0).astype(x.dtype)
        variables, _ = agree_on_variables(state.variables, state.sync.copies["variables"])
        params = jax.tree.map(mean, state.sync.copies["params"])
        return state.replace(params=params, variables=variables)

    return Algorithm(init, state, make_step, agreed)


def mix_neighbours(params: Any, replicas: Replicas) -> Any:
    """`[R, ...]` -> the mean of each replica, the one before and the one after it.

    Two replicas are each other's only neighbour: they average in one exchange.
    """
    count = replicas.count
    right = [(i, (i + 1) % count) for i in range(count)]
    left = [(j, i) for i, j in right]
    ways = [] if count == 1 else [right] if count == 2 else [right, left]

    def one(x: jax.Array) -> jax.Array:
        near = [jax.lax.ppermute(x, AXIS, perm=way) for way in ways]
        total = sum((n.astype(jnp.float32) for n in near), x.astype(jnp.float32))
        return (total / (len(ways) + 1)).astype(x.dtype)

    specs = replicas.stacked()
    return replicas.on_devices(lambda tree: jax.tree.map(one, tree), (specs,), specs)(params)
