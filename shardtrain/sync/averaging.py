"""Local SGD, FedAvg and DiLoCo: local steps, then an outer step on the mean change.

Design: `state.params` are the parameters last agreed on and `state.opt_state` is the outer
optimizer's state; what the replicas train is in `state.sync.copies`. Local SGD is the outer step
with learning rate 1. Between two exchanges nothing crosses the network but the step's metrics, a
few scalars. The exchange sits in the branch of a conditional that all replicas take together.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import PartitionSpec

from shardtrain.algorithms import DiLoCo, LocalSGD, Nesterov, Privacy
from shardtrain.errors import StrategyError
from shardtrain.pytree import leaves_by_path, map_with_path
from shardtrain.sync.algorithm import Algorithm, Job
from shardtrain.sync.exchange import Exchange, make_exchange
from shardtrain.sync.gradients import agreed_variables, same_keys
from shardtrain.sync.local import (
    copies_specs,
    first_copies,
    local_metrics,
    make_local_step,
    once_known,
)
from shardtrain.sync.replicas import AXIS, Replicas, ReplicaState, broadcast
from shardtrain.train import GradFn, Step, TrainState, step_metrics


@dataclass(frozen=True)
class Fragment:
    """Parameters that are exchanged together.

    Args:
      paths: Their paths.
      turn: Exchanged after steps `t` with `(t + 1) % sync_every == turn`.
      exchange: How their changes are summed.
    """

    paths: tuple[str, ...]
    turn: int
    exchange: Exchange

    def of(self, tree: Any) -> dict[str, Any]:
        """The fragment's leaves of a params-shaped tree, by path."""
        leaves = leaves_by_path(tree)
        return {path: leaves[path] for path in self.paths}


def averaging(sync: LocalSGD | DiLoCo, compression: Any, job: Job) -> Algorithm:
    """The algorithm.

    Args:
      sync: How often, with which weights and which outer optimizer.
      compression: Of the changes that are exchanged; None: float32.
      job: The plan's parts.
    """
    _refuse_public_variables(sync, job)
    fragments = make_fragments(sync, compression, job)
    outer = outer_optimizer(sync)
    count = job.replicas.count

    def init(params: Any, variables: Any) -> tuple[Any, ReplicaState]:
        memories = [f.exchange.init(f.of(params)) for f in fragments]
        return tuple(outer.init(f.of(params)) for f in fragments), ReplicaState(
            copies=first_copies(job, params, variables),
            parts={
                "weight": jnp.zeros((count, len(fragments)), jnp.float32),
                "error": tuple(m.parts for m in memories),
            },
            shared=tuple(m.shared for m in memories),
        )

    opt_state, memory = jax.eval_shape(init, job.params, job.state.variables)
    state = job.state.replace(
        opt_state=job.sharded(opt_state, job.optimizer_specs(opt_state, job.replicas.specs)),
        sync=job.sharded(memory, _specs(fragments, job)),
    )

    def make_step(grad_fn: GradFn) -> Step:
        rates = sync.learning_rates if isinstance(sync, LocalSGD) else ()
        pull = sync.proximal if isinstance(sync, LocalSGD) else 0.0
        local = make_local_step(grad_fn, job, rates, pull)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            key = jax.random.fold_in(state.rng, state.step)
            found = local(state.sync.copies, state.params, batch, key)
            output, metrics = local_metrics(found)
            seen = jnp.where(found.taken, found.output.loss.weight, 0.0)
            parts = state.sync.parts | {"weight": state.sync.parts["weight"] + seen[:, None]}
            done = state.step + 1
            new = state.replace(
                step=done,
                skipped=state.skipped + metrics["skipped"],
                sync=ReplicaState(found.copies, parts, state.sync.shared),
            )
            for number, fragment in enumerate(fragments):
                agree = lambda s, n=number, f=fragment: _agree(sync, job, outer, s, f, n)
                due = done % sync.sync_every == fragment.turn
                new = _now_or_not(once_known(due, (output, metrics)), agree, new)
            return new, step_metrics(output) | metrics

        return step

    return Algorithm(init, state, make_step)


def make_fragments(sync: LocalSGD | DiLoCo, compression: Any, job: Job) -> list[Fragment]:
    """Consecutive parameters, about equally many numbers in each fragment.

    Raises:
      StrategyError: There are fewer arrays than fragments.
    """
    number = sync.fragments if isinstance(sync, DiLoCo) else 1
    leaves = leaves_by_path(job.params)
    if number > len(leaves):
        raise StrategyError(f"fragments={number}, but the model has {len(leaves)} arrays")
    specs, groups, filled = leaves_by_path(job.replicas.specs), [[] for _ in range(number)], 0
    total, left = sum(x.size for x in leaves.values()), len(leaves)
    group = 0
    for path, x in leaves.items():
        must = left == number - group - 1 and bool(groups[group])
        if groups[group] and (must or filled >= total * (group + 1) / number):
            group = min(group + 1, number - 1)
        groups[group].append(path)
        filled, left = filled + x.size, left - 1
    every = sync.sync_every
    return [
        Fragment(
            tuple(paths),
            (n + 1) * every // number % every,
            make_exchange(
                compression,
                Replicas(job.replicas.mesh, {p: specs[p] for p in paths}, job.replicas.hosts),
            ),
        )
        for n, paths in enumerate(groups)
    ]


def outer_optimizer(sync: LocalSGD | DiLoCo) -> optax.GradientTransformation:
    """What is applied to `last agreed - mean of the replicas`."""
    if isinstance(sync, LocalSGD):
        return optax.sgd(1.0)
    outer = sync.outer_optimizer
    if isinstance(outer, Nesterov):
        return optax.sgd(outer.learning_rate, momentum=outer.momentum, nesterov=True)
    if not isinstance(outer, optax.GradientTransformation):
        raise StrategyError(
            f"DiLoCo(outer_optimizer=...) is a {type(outer).__name__}, not st.Nesterov(...) or an "
            "optax.GradientTransformation"
        )
    return outer


def _specs(fragments: list[Fragment], job: Job) -> ReplicaState:
    memories = [f.exchange.specs(f.of(job.params)) for f in fragments]
    return ReplicaState(
        copies=copies_specs(job),
        parts={"weight": PartitionSpec(AXIS), "error": tuple(m.parts for m in memories)},
        shared=tuple(m.shared for m in memories),
    )


def _now_or_not(due: jax.Array, agree: Any, state: TrainState) -> TrainState:
    """A conditional over arrays: a typed key among the operands would not lower everywhere."""
    rng = state.rng
    new = jax.lax.cond(due, agree, lambda s: s, state.replace(rng=None))
    return new.replace(rng=rng)


def _agree(
    sync: LocalSGD | DiLoCo, job: Job, outer: Any, state: TrainState, f: Fragment, number: int
) -> TrainState:
    """Exchange one fragment's changes, take the outer step, start again from the result."""
    copies, parts = state.sync.copies, dict(state.sync.parts)
    anchor, mine = f.of(state.params), f.of(copies["params"])
    with jax.named_scope(f"every_{sync.sync_every}_steps"):
        memory = ReplicaState(parts=parts["error"][number], shared=state.sync.shared[number])
        privacy = sync.privacy if isinstance(sync, LocalSGD) else None
        changes = jax.tree.map(lambda a, p: (a[None] - p).astype(jnp.float32), anchor, mine)
        if privacy is not None:
            mean = private_mean(privacy, changes, state.step)
        else:
            share = _shares(sync, parts["weight"][:, number])
            shares = jax.tree.map(lambda x: x * _like(share, x), changes)
            mean, memory = f.exchange.run(shares, memory)
    mean = jax.tree.map(lambda m, a: m.astype(a.dtype), mean, anchor)
    updates, outer_state = outer.update(mean, state.opt_state[number], anchor)
    agreed = optax.apply_updates(anchor, updates)

    def put(tree: Any, values: Any) -> Any:
        return map_with_path(lambda path, x: values.get(path, x), tree)

    parts["weight"] = parts["weight"].at[:, number].set(0.0)
    parts["error"] = _replaced(parts["error"], number, memory.parts)
    again = broadcast(agreed, job.replicas.count)
    copies = copies | {"params": put(copies["params"], again)}
    variables = state.variables
    if number == 0:
        variables, copies["variables"] = agree_on_variables(variables, copies["variables"])
    return state.replace(
        params=put(state.params, agreed),
        opt_state=_replaced(state.opt_state, number, outer_state),
        variables=variables,
        sync=ReplicaState(copies, parts, _replaced(state.sync.shared, number, memory.shared)),
    )


def private_mean(privacy: Privacy, changes: Any, step: jax.Array) -> Any:
    """The mean of the clipped changes, with noise.

    Args:
      privacy: Norm and noise.
      changes: `[R, ...]` each.
      step: Steps done; the noise is a function of it and the seed.
    """
    key = jax.random.fold_in(jax.random.key(privacy.seed), step)
    noised = optax.contrib.differentially_private_aggregate(privacy.clip, privacy.noise, key)
    return noised.update(changes, noised.init(changes))[0]


def _refuse_public_variables(sync: LocalSGD | DiLoCo, job: Job) -> None:
    """Variables are averaged as they are.

    Raises:
      StrategyError: With privacy, and a model that has some.
    """
    if not isinstance(sync, LocalSGD) or sync.privacy is None:
        return
    for path, x in leaves_by_path(job.state.variables).items():
        if jnp.issubdtype(x.dtype, jnp.floating):
            raise StrategyError(
                f"LocalSGD(privacy=...) covers parameters, but {path} is averaged without noise. "
                "Use a model without batch statistics (LayerNorm, GroupNorm)"
            )


def agree_on_variables(before: Any, copies: Any) -> tuple[Any, Any]:
    """The mean of what replicas made of the model's variables, and their copies set to it.

    Counters stay as they are, and random keys stay different.
    """
    agreed = same_keys(agreed_variables(before, copies), before)

    def one(new: Any, old: Any) -> Any:
        floating = jnp.issubdtype(old.dtype, jnp.floating)
        return jnp.broadcast_to(new[None], old.shape) if floating else old

    return agreed, jax.tree.map(one, agreed, copies)


def _shares(sync: LocalSGD | DiLoCo, weights: jax.Array) -> jax.Array:
    """`[R]` that adds up to 1: by examples seen, or equal."""
    equal = jnp.full(weights.shape, 1.0 / weights.size)
    if sync.weighting == "equal":
        return equal
    total = jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), equal)


def _like(share: jax.Array, x: jax.Array) -> jax.Array:
    return share.reshape(-1, *[1] * (x.ndim - 1))


def _replaced(items: tuple[Any, ...], number: int, value: Any) -> tuple[Any, ...]:
    return (*items[:number], value, *items[number + 1 :])
