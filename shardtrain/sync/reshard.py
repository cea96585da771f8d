"""Another number of replicas: the rule for what each of them kept.

- `copies` (parameters, moments): the new replicas all start from the mean of the old. Counters are
  alike and kept; random keys are dealt out in turn.
- `parts` (rounding errors, unsent gradients, example counts): each new replica gets an equal part
  of the old sum, so that what was not yet sent still arrives, once.
- `shared`: kept; the low-rank factors of another layout are averaged, they are only a first guess.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.sync.gradients import is_key
from shardtrain.sync.replicas import ReplicaState


def saved_form(named: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Abstract leaves with the leading dims they were saved with.

    Args:
      named: Name -> abstract leaf with sharding, of this plan.
      saved: Name -> shape in the checkpoint.
    """

    def one(name: str, leaf: Any) -> Any:
        shape = saved.get(name, leaf.shape)
        if shape == leaf.shape or len(shape) != leaf.ndim or shape[1:] != leaf.shape[1:]:
            return leaf
        old = leaf.sharding
        spec = PartitionSpec(None, *old.spec[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(old.mesh, spec))

    return {name: one(name, leaf) for name, leaf in named.items()}


def needs_reshard(state: Any, like: Any) -> bool:
    """Whether a replicas' state has other leading dims than planned."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
    return any(x.shape != y.shape for x, y in pairs)


def reshard(state: ReplicaState, like: ReplicaState) -> ReplicaState:
    """The state for another number of replicas.

    Args:
      state: As saved.
      like: Abstract, as planned.

    Example:
      >>> old = ReplicaState(copies=jnp.array([1.0, 3.0]), parts=jnp.array([1.0, 3.0]))
      >>> like = ReplicaState(copies=jnp.zeros(4), parts=jnp.zeros(4))
      >>> new = reshard(old, like)
      >>> new.copies.tolist(), new.parts.tolist()
      ([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0])
    """
    return ReplicaState(
        copies=jax.tree.map(_mean, state.copies, like.copies),
        parts=jax.tree.map(_equal_parts, state.parts, like.parts),
        shared=jax.tree.map(_mean, state.shared, like.shared),
    )


def _mean(old: jax.Array, like: Any) -> jax.Array:
    if old.shape == like.shape:
        return old
    count = like.shape[0]
    if is_key(old):
        return old[jnp.arange(count) % old.shape[0]]
    if jnp.issubdtype(old.dtype, jnp.floating):
        one = jnp.mean(old.astype(jnp.float32), axis=0).astype(old.dtype)
    else:
        one = jnp.max(old, axis=0)
    return jnp.broadcast_to(one, like.shape)


def _equal_parts(old: jax.Array, like: Any) -> jax.Array:
    if old.shape == like.shape:
        return old
    return jnp.broadcast_to(jnp.sum(old, axis=0) / like.shape[0], like.shape)
