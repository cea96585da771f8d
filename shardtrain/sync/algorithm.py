"""What every algorithm is made from, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.sync.replicas import Replicas, ReplicaState
from shardtrain.train import GradFn, Step, TrainState


@dataclass(frozen=True)
class Job:
    """What an algorithm needs to know of a plan.

    Args:
      replicas: The replicas and how one version of the parameters is sharded inside each.
      optimizer: The user's.
      max_grad_norm: Clip gradients to this, or None.
      state: Abstract `TrainState` with shardings, without replicas' state.
      batch: Abstract batch with shardings.
      shard_update: Constrains a params-shaped tree to what each device updates (ZeRO).
      optimizer_specs: `(abstract optimizer state, {path: spec} to use instead)` -> specs.
    """

    replicas: Replicas
    optimizer: optax.GradientTransformation
    max_grad_norm: float | None
    state: TrainState
    batch: Any
    shard_update: Callable[[Any], Any]
    optimizer_specs: Callable[..., Any]

    @property
    def params(self) -> Any:
        """Abstract parameters."""
        return self.state.params

    def sharded(self, tree: Any, specs: Any) -> Any:
        """Abstract arrays with shardings."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(self.replicas.mesh, s)
            ),
            tree,
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def constrain(self, tree: Any, specs: Any) -> Any:
        """Keep a tree in the given specs."""
        return jax.tree.map(
            lambda x, s: jax.lax.with_sharding_constraint(x, NamedSharding(self.replicas.mesh, s)),
            tree,
            specs,
        )


@dataclass(frozen=True)
class Algorithm:
    """How replicas agree, as pure functions.

    Args:
      init: `(params, variables) -> (optimizer state, ReplicaState)`.
      state: Abstract `TrainState` with shardings, replicas' state included.
      make_step: From the gradient function of one replica to the step of all.
      agreed: The state with the parameters that the replicas agree on, for evaluation and export;
        None where `state.params` already are.
    """

    init: Callable[[Any, Any], tuple[Any, ReplicaState | None]]
    state: TrainState
    make_step: Callable[[GradFn], Step]
    agreed: Callable[[TrainState], TrainState] | None = None
