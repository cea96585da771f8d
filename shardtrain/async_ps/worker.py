"""What a run trains, and what its workers do."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from shardtrain.async_ps.server import Arrays
from shardtrain.async_ps.wire import Address, connect
from shardtrain.errors import ModelError
from shardtrain.plan import Plan
from shardtrain.plan import plan as make_plan
from shardtrain.pytree import leaves_by_path
from shardtrain.strategy import Strategy

# Servers own the model's own arrays, not stacked layers.
_ONE_DEVICE = Strategy(scan_layers=False)


@dataclass(frozen=True)
class AsyncJob:
    """What is trained.

    Args:
      model: As for `st.plan`, without variables of its own (batch statistics, rngs).
      loss_fn: As for `st.plan`.
      optimizer: Applied by every server to the arrays it owns: it must treat arrays alone.
      batch: `batch(step)`: the batch of a step.
      seed: Of the first parameters.
    """

    model: Any
    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    batch: Callable[[int], Any]
    seed: int = 0


def plan_of(job: AsyncJob) -> Plan:
    """One device's plan of the job.

    Raises:
      ModelError: The model has variables that workers would each change in their own way.
    """
    batch = job.batch(0)
    one = jax.local_devices()[:1]
    plan = make_plan(job.model, job.loss_fn, job.optimizer, batch, _ONE_DEVICE, devices=one)
    if jax.tree.leaves(plan.form.abstract_variables):
        raise ModelError(
            f"{plan.form.name} has variables besides its parameters "
            f"({', '.join(list(leaves_by_path(plan.form.abstract_variables))[:3])}): no server "
            "owns them. Use Strategy(sync=...), whose replicas agree on them"
        )
    return plan


def run_worker(
    make_job: Callable[[], AsyncJob],
    worker: int,
    clock_address: Address,
    servers: list[tuple[Address, list[str]]],
    delay: float,
    key: bytes,
) -> None:
    """A worker process: take a step, pull, compute, push, until nothing is left."""
    job = make_job()
    plan = plan_of(job)
    clock = connect("clock", clock_address, key)
    shards = [(connect("shard", address, key), owned) for address, owned in servers]
    gradient = make_gradient(plan, job)
    while (step := clock.next(worker)) is not None:
        params, versions = {}, []
        for shard, _ in shards:
            version, part = shard.pull()
            params |= part
            versions.append(version)
        loss, grads = gradient(params, step)
        time.sleep(delay)
        late = [
            shard.push(step, version, {path: grads[path] for path in owned})
            for (shard, owned), version in zip(shards, versions, strict=True)
        ]
        clock.done(worker, step, loss, max(late))


def make_gradient(plan: Plan, job: AsyncJob) -> Callable[[Arrays, int], tuple[float, Arrays]]:
    """`(path -> parameter, step) -> (loss, path -> mean gradient)`, as `plan.step` has them."""
    structure = jax.tree.structure(plan.form.abstract_params)
    order = list(leaves_by_path(plan.form.abstract_params))

    def run(params: Any, batch: Any, step: Any) -> Any:
        rng = jax.random.fold_in(jax.random.key(job.seed), 1)
        tree = structure.unflatten([params[path] for path in order])
        found = plan.gradients.grad_fn(tree, {}, batch, jax.random.fold_in(rng, step))
        weight = found.output.loss.weight
        return found.output.loss.value, jax.tree.map(lambda g: g / weight, found.grads)

    compiled = jax.jit(run)

    def gradient(params: Arrays, step: int) -> tuple[float, Arrays]:
        loss, grads = compiled(params, job.batch(step), np.int32(step))
        return float(loss), {p: np.asarray(g) for p, g in leaves_by_path(grads).items()}

    return gradient
