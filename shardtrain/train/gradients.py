"""Gradients of sums: of one batch, over microbatches, over replicas.

Design: a `GradFn` maps `(params, variables, batch, key)` to `Gradients`, which are *sums* over the
examples it saw. Sums add, so each wrapper below splits the batch, calls the wrapped function on
the parts and adds. The division by the total weight happens once, in the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.modules.losses import LossOutput
from shardtrain.train.widen import widen

LossFn = Callable[[Any, Any, Any, jax.Array], tuple[LossOutput, Any]]
"""`(params, variables, batch, key) -> (sums, new variables)`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gradients:
    """Gradient sums of one or more microbatches.

    Args:
      grads: d(total loss)/d(params), float32, undivided.
      output: Sums of loss, weight and metrics.
      variables: The model's other variables afterwards.
    """

    grads: Any
    output: LossOutput
    variables: Any


GradFn = Callable[[Any, Any, Any, jax.Array], Gradients]


def value_and_grad(loss_fn: LossFn, float32_sums: bool = False) -> GradFn:
    """The gradient of the loss total of one batch.

    Args:
      loss_fn: The loss.
      float32_sums: It computes in bfloat16; its gradients are to be summed in float32.
    """

    def total(params: Any, variables: Any, batch: Any, key: jax.Array) -> Any:
        output, new_variables = loss_fn(params, variables, batch, key)
        return output.loss.total, (output, new_variables)

    def grad_fn(params: Any, variables: Any, batch: Any, key: jax.Array) -> Gradients:
        (_, (output, new)), grads = jax.value_and_grad(total, has_aux=True)(
            params, variables, batch, key
        )
        return Gradients(grads, output, new)

    return widen(grad_fn, lambda found: found.grads) if float32_sums else grad_fn


def split_batch(batch: Any, parts: int) -> Any:
    """`[B, ...] -> [parts, B // parts, ...]`, strided: part i gets rows i, i + parts, ...

    A batch sharded over devices splits this way without moving a row; the contiguous split would
    need an all-to-all.
    """

    def split(x: jax.Array) -> jax.Array:
        if jnp.ndim(x) == 0:
            return jnp.broadcast_to(x, (parts,))
        rows = x.shape[0] // parts
        return x.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def over_microbatches(
    grad_fn: GradFn, num_microbatches: int, constrain: Callable[[Any], Any]
) -> GradFn:
    """Run one microbatch after another, adding gradients and sums.

    Args:
      grad_fn: Gradients of one microbatch.
      num_microbatches: Number of parts, M.
      constrain: Keeps the gradient accumulator in its sharding.
    """

    def accumulated(params: Any, variables: Any, batch: Any, key: jax.Array) -> Gradients:
        parts = split_batch(batch, num_microbatches)
        like = jax.eval_shape(grad_fn, params, variables, jax.tree.map(lambda x: x[0], parts), key)
        # Sums are kept in float32 also for parameters of a narrower dtype.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (like.grads, like.output))

        def body(carry: Any, part: Any) -> tuple[Any, None]:
            (grads, output), variables = carry
            index, microbatch = part
            found = grad_fn(params, variables, microbatch, jax.random.fold_in(key, index))
            sums = jax.tree.map(jnp.add, (grads, output), (found.grads, found.output))
            return ((constrain(sums[0]), sums[1]), found.variables), None

        carry = ((constrain(zeros[0]), zeros[1]), variables)
        numbered = (jnp.arange(num_microbatches), parts)
        ((grads, output), variables), _ = jax.lax.scan(body, carry, numbered)
        grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, like.grads)
        return Gradients(grads, output, variables)

    return accumulated


def per_replica(grad_fn: GradFn, num_replicas: int, axes: tuple[str, ...]) -> GradFn:
    """Gradients of each replica's own rows, with a leading replica dim, nothing reduced.

    Only for losses that are sums over examples (no batch statistics, no whole-batch dropout
    masks): then the sum over the leading dim equals the gradient of the whole batch.

    Args:
      grad_fn: Gradients of one batch.
      num_replicas: Product of the batch axes, R.
      axes: Mesh axes that shard the batch dim.
    """

    def mapped(params: Any, variables: Any, batch: Any, key: jax.Array) -> Gradients:
        rows = jax.tree.map(lambda x: x.reshape(num_replicas, -1, *x.shape[1:]), batch)

        def flat(batch: Any) -> tuple[Any, Any]:
            found = grad_fn(params, variables, batch, key)
            return (found.grads, found.output), found.variables

        sums, variables = jax.vmap(flat, out_axes=(0, None), spmd_axis_name=axes)(rows)
        return Gradients(*sums, variables)

    return mapped


def sum_replicas(grad_fn: GradFn, constrain: Callable[[Any], Any]) -> GradFn:
    """Add the leading replica dim away: one reduction over the batch axes, in float32."""

    def summed(params: Any, variables: Any, batch: Any, key: jax.Array) -> Gradients:
        found = grad_fn(params, variables, batch, key)
        grads, output = jax.tree.map(
            lambda x: jnp.sum(x.astype(jnp.float32), axis=0).astype(x.dtype),
            (found.grads, found.output),
        )
        return Gradients(constrain(grads), output, found.variables)

    return summed


def first_microbatch_key(grad_fn: GradFn) -> GradFn:
    """One microbatch draws the keys that microbatch 0 of several would."""

    def keyed(params: Any, variables: Any, batch: Any, key: jax.Array) -> Gradients:
        return grad_fn(params, variables, batch, jax.random.fold_in(key, 0))

    return keyed
