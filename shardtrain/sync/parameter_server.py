"""Parameter server: push gradients to the owners, update there, pull parameters.

Design: owners hold optimizer state and update their part (the memory of ZeRO-1 over `data`). With
`max_staleness=k > 0` a step pushes the gradients that the *previous* step computed and applies
those of `k` steps ago; neither push, update nor pull depends on the gradient it is computing, so
the compiler may run them side by side. Everything late is part of the state, so that resuming is
exact. A step that is not finite changes nothing, and the late gradients wait one step longer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.algorithms import ParameterServer
from shardtrain.sync.algorithm import Algorithm, Job
from shardtrain.sync.codecs import make_codec
from shardtrain.sync.gradients import agreed_variables, all_finite, local_gradients
from shardtrain.sync.owners import Owners, find_owners, make_push
from shardtrain.sync.replicas import ReplicaState
from shardtrain.train import GradFn, Step, TrainState, make_update


def parameter_server(sync: ParameterServer, compression: Any, job: Job) -> Algorithm:
    """The algorithm.

    Args:
      sync: Staleness and its compensation.
      compression: Of the push; None: float32. Parameters are pulled in float32.
      job: The plan's parts.
    """
    owners = find_owners(job.params, job.replicas)
    feedback = compression is not None and compression.error_feedback
    late = _Late(sync, owners)

    def init(params: Any, variables: Any) -> tuple[Any, ReplicaState]:
        zeros = lambda x: jnp.zeros((job.replicas.count, *x.shape), jnp.float32)
        parts = {"error": jax.tree.map(zeros, params)} if feedback else {}
        if sync.max_staleness:
            parts["pending"] = jax.tree.map(zeros, params)
        return job.optimizer.init(params), ReplicaState(parts=parts, shared=late.init(params))

    opt_state, memory = jax.eval_shape(init, job.params, job.state.variables)
    stacked = {name: job.replicas.stacked() for name in memory.parts}
    specs = ReplicaState(parts=stacked, shared=late.specs())
    state = job.state.replace(
        opt_state=job.sharded(opt_state, job.optimizer_specs(opt_state, owners.specs)),
        sync=job.sharded(memory, specs),
    )

    def make_step(grad_fn: GradFn) -> Step:
        local = local_gradients(grad_fn, job.replicas, job.batch)
        to_owners = lambda tree: job.constrain(tree, owners.specs)
        update = make_update(job.optimizer, job.max_grad_norm, to_owners)
        push = make_push(owners, make_codec(compression))

        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            key = jax.random.fold_in(state.rng, state.step)
            found = local(state.params, state.variables, batch, key)
            output = jax.tree.map(lambda x: jnp.sum(x, axis=0), found.output)
            shares = jax.tree.map(
                lambda g: (g / output.loss.weight).astype(jnp.float32), found.grads
            )
            memory = state.sync
            grads, error = push(memory.parts.get("pending", shares), memory.parts.get("error"))
            grads, shared = late.turn(grads, to_owners(state.params), memory.shared)
            parts = {"error": error} if feedback else {}
            if sync.max_staleness:
                parts["pending"] = shares
            ready = state.step - state.skipped >= sync.max_staleness
            variables = agreed_variables(state.variables, found.variables)
            finite = all_finite(shares)
            new, metrics = update(state, grads, output, variables, finite, ready)
            keep = lambda n, o: jnp.where(metrics["skipped"] == 0, n, o)
            memory = jax.tree.map(keep, ReplicaState(parts=parts, shared=shared), memory)
            return new.replace(sync=memory), metrics

        return step

    return Algorithm(init, state, make_step)


class _Late:
    """What waits at the owners: sums already pushed, and the parameters they were computed at."""

    def __init__(self, sync: ParameterServer, owners: Owners):
        self._waiting = max(sync.max_staleness - 1, 0)
        self._strength = sync.delay_compensation
        self._history = sync.max_staleness if self._strength else 0
        self._owners = owners

    def init(self, params: Any) -> dict[str, Any]:
        queue = lambda n: jax.tree.map(lambda x: jnp.zeros((n, *x.shape), jnp.float32), params)
        return {name: queue(n) for name, n in self._lengths().items()}

    def specs(self) -> dict[str, Any]:
        queued = jax.tree.map(lambda s: PartitionSpec(None, *s), self._owners.specs)
        return dict.fromkeys(self._lengths(), queued)

    def turn(self, grads: Any, params: Any, queues: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The sums to apply now, and the queues one step further."""
        new = {}
        if self._waiting:
            grads, new["sums"] = _shift(queues["sums"], grads)
        if self._history:
            then, new["params"] = _shift(queues["params"], params)
            corrected = lambda g, now, old: g + self._strength * g * g * (now - old)
            grads = jax.tree.map(corrected, grads, params, then)
        return grads, new

    def _lengths(self) -> dict[str, int]:
        lengths = {"sums": self._waiting, "params": self._history}
        return {name: n for name, n in lengths.items() if n}


def _shift(queue: Any, newest: Any) -> tuple[Any, Any]:
    """The oldest entry, and the queue with the newest behind."""
    behind = lambda q, x: jnp.concatenate([q[1:], x[None].astype(q.dtype)])
    return jax.tree.map(lambda q: q[0], queue), jax.tree.map(behind, queue, newest)
