"""Each replica's own gradient sums: the local half of every algorithm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.sync.replicas import AXIS, Replicas, map_replicas
from shardtrain.train import GradFn, Gradients

LocalGradFn = Callable[[Any, Any, Any, jax.Array], Gradients]
"""`(params, variables, batch, key) -> Gradients`, all of it with a leading replica dim."""


def local_gradients(grad_fn: GradFn, replicas: Replicas, batch: Any) -> LocalGradFn:
    """Gradients of every replica's own rows at the same parameters, nothing reduced.

    Replica `r` draws its random numbers from `fold_in(key, r)`.

    Args:
      grad_fn: Gradients of one replica's rows.
      replicas: The replicas.
      batch: Abstract batch with shardings.
    """
    rows = own_rows(batch)

    def one(index: jax.Array, params: Any, variables: Any, part: Any, key: jax.Array) -> Gradients:
        own = own_keys(variables, index)
        found = grad_fn(params, own, part, jax.random.fold_in(key, index))
        return Gradients(found.grads, found.output, same_keys(found.variables, variables))

    mapped = map_replicas(one, replicas, (False, False, rows, False))

    def local(params: Any, variables: Any, batch: Any, key: jax.Array) -> Gradients:
        return mapped(params, variables, split_rows(batch, replicas.count, rows), key)

    return local


def own_rows(batch: Any) -> Any:
    """Batch-shaped tree: whether replicas get rows of their own, or all see the array whole.

    Args:
      batch: Abstract arrays with shardings.
    """

    def splits(leaf: Any) -> bool:
        spec = leaf.sharding.spec
        first = spec[0] if len(spec) else None
        names = (first,) if isinstance(first, str) else first or ()
        return bool(leaf.shape) and (AXIS in names or leaf.sharding.mesh.shape[AXIS] == 1)

    return jax.tree.map(splits, batch)


def split_rows(batch: Any, count: int, own: Any) -> Any:
    """`[B, ...] -> [R, B / R, ...]`: consecutive rows, so that none moves."""
    return jax.tree.map(lambda x, o: x.reshape(count, -1, *x.shape[1:]) if o else x, batch, own)


def is_key(x: Any) -> bool:
    """Whether a leaf is a typed random key."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def own_keys(variables: Any, index: jax.Array) -> Any:
    """Random keys among the model's variables (NNX), different on every replica."""

    def fold(x: Any) -> Any:
        if not is_key(x):
            return x
        fold_all = lambda k: jax.random.fold_in(k, index)
        return jax.vmap(fold_all)(x.reshape(-1)).reshape(x.shape) if x.ndim else fold_all(x)

    return jax.tree.map(fold, variables)


def same_keys(variables: Any, before: Any) -> Any:
    """The keys as they were before `own_keys`."""
    return jax.tree.map(lambda new, old: old if is_key(new) else new, variables, before)


def agreed_variables(before: Any, after: Any) -> Any:
    """One version of what the replicas left: floating-point arrays averaged, others alike.

    The mean of the *changes* is added: what nobody changed stays as it is, to the bit.

    Args:
      before: The version all started from.
      after: `[R, ...]` of each.
    """

    def one(old: Any, new: Any) -> Any:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new[0]
        change = (new - old[None]).astype(jnp.float32)
        return old + jnp.mean(change, axis=0).astype(old.dtype)

    return jax.tree.map(one, before, after)


def all_finite(tree: Any) -> jax.Array:
    """Whether no replica has nan or infinity: its square norm says it with one number."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.isfinite(sum(squares, jnp.float32(0)))
