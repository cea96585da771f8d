"""All-reduce written out: each replica's gradient, then one exchange, then everyone's update."""

from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.sync.algorithm import Algorithm, Job
from shardtrain.sync.exchange import make_exchange
from shardtrain.sync.gradients import agreed_variables, all_finite, local_gradients
from shardtrain.sync.replicas import ReplicaState
from shardtrain.train import GradFn, Step, TrainState, make_update


def explicit_all_reduce(compression: Any, job: Job) -> Algorithm:
    """The mean gradient of all replicas, sent in few bytes where a compression says how.

    Each replica sends its gradient sum divided by the weight of the *whole* batch, so that
    replicas with more examples count for more, exactly.

    Args:
      compression: `Int8()` and the like with error feedback, or None for float32.
      job: The plan's parts.
    """
    exchange = make_exchange(compression, job.replicas)

    def init(params: Any, variables: Any) -> tuple[Any, ReplicaState]:
        return job.optimizer.init(params), exchange.init(params)

    memory = jax.eval_shape(exchange.init, job.params)
    state = job.state.replace(sync=job.sharded(memory, exchange.specs(job.params)))

    def make_step(grad_fn: GradFn) -> Step:
        local = local_gradients(grad_fn, job.replicas, job.batch)
        update = make_update(job.optimizer, job.max_grad_norm, job.shard_update)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            key = jax.random.fold_in(state.rng, state.step)
            found = local(state.params, state.variables, batch, key)
            output = jax.tree.map(lambda x: jnp.sum(x, axis=0), found.output)
            shares = jax.tree.map(lambda g: g / output.loss.weight, found.grads)
            finite = all_finite(shares)
            grads, memory = exchange.run(shares, state.sync)
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
            variables = agreed_variables(state.variables, found.variables)
            new, metrics = update(state, grads, output, variables, finite)
            keep = lambda n, o: jnp.where(metrics["skipped"] == 0, n, o)
            return new.replace(sync=jax.tree.map(keep, memory, state.sync)), metrics

        return step

    return Algorithm(init, state, make_step)
