"""FSDP at use: parameters are gathered where they are needed, gradients scattered back."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def gather_at_use(mesh: Any, compute_specs: Any, full_specs: Any) -> Callable[[Any], Any]:
    """A function that takes stored (fsdp-sharded) parameters to their compute layout.

    A plain sharding constraint transposes onto the gradient and would turn its reduce-scatter
    into an all-reduce; here the gradient is constrained to the stored shards instead.

    Args:
      mesh: The mesh.
      compute_specs: Params-shaped tree without fsdp.
      full_specs: Params-shaped tree with fsdp.
    """

    def gather(params: Any) -> Any:
        return jax.tree.map(
            lambda x, c, f: x if c == f else _gather_one(mesh, c, f)(x),
            params,
            compute_specs,
            full_specs,
        )

    return gather


def _gather_one(mesh: Any, compute: PartitionSpec, full: PartitionSpec) -> Callable[[Any], Any]:
    constrain = jax.lax.with_sharding_constraint
    whole, shards = NamedSharding(mesh, compute), NamedSharding(mesh, full)

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return constrain(x, whole)

    def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
        return (constrain(grad, shards),)

    gather.defvjp(lambda x: (constrain(x, whole), None), backward)
    return gather
