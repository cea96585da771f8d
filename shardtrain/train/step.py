"""One optimizer step as a pure function of state and batch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from shardtrain.errors import LossContractError
from shardtrain.modules.losses import LossOutput
from shardtrain.train.gradients import GradFn, LossFn
from shardtrain.train.state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]

RESERVED_METRICS = ("loss", "grad_norm", "weight", "skipped")


def make_step(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    max_grad_norm: float | None,
    shard_update: Callable[[Any], Any],
    norm_of: Callable[[Any], jax.Array] | None = None,
) -> Step:
    """Gradient, clip, update; a step that is not finite is counted and changes nothing else.

    Args:
      grad_fn: Sums of gradients over the global batch.
      optimizer: The user's optax transformation.
      max_grad_norm: Clip to this global norm, or None.
      shard_update: Constrains a params-shaped tree to the optimizer state's shards, so that each
        device updates what it owns (ZeRO).
      norm_of: The norm of gradients in these shards; None: `global_norm`.

    Returns:
      `(state, batch) -> (state, metrics)`.
    """

    apply = make_update(optimizer, max_grad_norm, shard_update, norm_of)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.rng, state.step)
        found = grad_fn(state.params, state.variables, batch, key)
        weight = found.output.loss.weight
        # A weight of 0 makes these nan, and the step is not taken: nothing to guard per number.
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), found.grads)
        return apply(state, grads, found.output, found.variables)

    return step


def make_update(
    optimizer: optax.GradientTransformation,
    max_grad_norm: float | None,
    shard_update: Callable[[Any], Any],
    norm_of: Callable[[Any], jax.Array] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The part of a step behind the gradient; arguments as `make_step`.

    Returns:
      `(state, mean gradients, output sums, variables, finite=True, ready=True) -> (state,
      metrics)`. `finite` is one more condition for the step to be taken; where `ready` is False
      parameters do not change either, but the step does not count as skipped.
    """
    # Some transformations want the loss (`reduce_on_plateau`); the others ignore it.
    update = optax.with_extra_args_support(optimizer).update

    def apply(
        state: TrainState,
        grads: Any,
        output: LossOutput,
        variables: Any,
        finite: Any = True,
        ready: Any = True,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        norm = global_norm(grads) if norm_of is None else norm_of(shard_update(grads))
        loss, weight = output.loss.value, output.loss.weight
        if max_grad_norm is not None:
            grads = clip(grads, norm, max_grad_norm)
        finite = finite & jnp.isfinite(output.loss.total / weight) & jnp.isfinite(norm)

        params = shard_update(state.params)
        updates, opt_state = update(shard_update(grads), state.opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        keep = lambda take, new, old: jax.tree.map(lambda n, o: jnp.where(take, n, o), new, old)
        new_state = state.replace(
            step=state.step + 1,
            params=keep(finite & ready, params, state.params),
            opt_state=keep(finite & ready, opt_state, state.opt_state),
            variables=keep(finite, variables, state.variables),
            skipped=state.skipped + (1 - finite.astype(jnp.int32)),
        )
        metrics = step_metrics(output) | {
            "grad_norm": jnp.where(weight > 0, norm, 0.0),
            "skipped": 1 - finite.astype(jnp.int32),
        }
        return new_state, metrics

    return apply


def step_metrics(output: LossOutput) -> dict[str, jax.Array]:
    """Loss, weight and the user's metrics as scalars.

    Raises:
      LossContractError: A metric of the user has a name of ours.
    """
    clash = sorted(set(output.metrics) & set(RESERVED_METRICS))
    if clash:
        raise LossContractError(
            f"metric name {clash[0]!r} is shardtrain's own (reserved: "
            f"{', '.join(RESERVED_METRICS)}); rename it"
        )
    metrics = {name: mean.value for name, mean in output.metrics.items()}
    return metrics | {"loss": output.loss.value, "weight": output.loss.weight}


def global_norm(tree: Any) -> jax.Array:
    """L2 norm of all arrays together, accumulated in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def sharded_norm(mesh: Any, specs: Any) -> Callable[[Any], jax.Array] | None:
    """`global_norm` of arrays in shards, for which one number crosses devices, not one per array.

    XLA sums each array over devices by itself, and packs that sum with the next gradient: then
    every message waits for the one before.

    Args:
      mesh: The mesh.
      specs: Tree of `PartitionSpec`, as the arrays are sharded.

    Returns:
      Tree of arrays -> scalar; None where no array is sharded.
    """
    parts = lambda spec: math.prod(mesh.shape[axis] for axis in _axes(spec))
    copies = [mesh.size // parts(spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)]
    if all(count == mesh.size for count in copies):
        return None

    def squares(tree: Any) -> jax.Array:
        found = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
        # A shard that lies on several devices is counted on each of them.
        total = sum((s / n for s, n in zip(found, copies, strict=True)), start=jnp.float32(0))
        return jax.lax.psum(total, mesh.axis_names)

    over_devices = jax.shard_map(
        squares, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
    )
    return lambda tree: jnp.sqrt(over_devices(tree))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _axes(spec: PartitionSpec) -> list[str]:
    return [a for entry in spec if entry for a in (entry if isinstance(entry, tuple) else (entry,))]


def clip(grads: Any, norm: jax.Array, max_norm: float) -> Any:
    """Scale all gradients so that their global norm is at most `max_norm` (Pascanu et al. 2013)."""
    scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def make_eval(loss_fn: LossFn) -> Callable[[TrainState, Any], dict[str, Any]]:
    """Loss and metrics of a batch as `Mean`s, so that batches add up exactly; no update."""

    def evaluate(state: TrainState, batch: Any) -> dict[str, Any]:
        key = jax.random.fold_in(state.rng, state.step)
        output, _ = loss_fn(state.params, state.variables, batch, key)
        return {**output.metrics, "loss": output.loss}

    return evaluate


def over_rows(evaluate: Callable[..., Any], axes: tuple[str, ...]) -> Callable[..., Any]:
    """Evaluate each row as a batch of its own, and add up those that count.

    Args:
      evaluate: From `make_eval`.
      axes: Mesh axes that shard the batch dim.

    Returns:
      `(state, batch, rows[batch]) -> ` name -> `Mean` over rows with weight 1.
    """

    def by_row(state: TrainState, batch: Any, rows: jax.Array) -> dict[str, Any]:
        def one(row: Any) -> Any:
            return evaluate(state, jax.tree.map(lambda x: x[None], row))

        means = jax.vmap(one, spmd_axis_name=axes or None)(batch)
        # `where`, not a product: a padding row may hold anything, and 0 * nan is nan.
        return jax.tree.map(lambda x: jnp.sum(jnp.where(rows > 0, x * rows, 0.0)), means)

    return by_row
