"""The mesh an operation runs on, as the plan (or the user) set it while the model is traced."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from shardtrain.partitioning.rules import BATCH_AXES, as_axes


@dataclass(frozen=True)
class Here:
    """Mesh axes of size > 1 around an operation; hashable.

    Args:
      mesh: The mesh; empty on one device.
      batch_axes: Those that split the rows of the batch at hand. A plan that splits some of them
        off itself (one gradient per replica) does not name them here.
    """

    mesh: AbstractMesh
    batch_axes: tuple[str, ...]

    def size(self, axes: str | tuple[str, ...]) -> int:
        """Product of mesh axis sizes; 1 for an axis that is not there."""
        shape = dict(self.mesh.shape)
        return math.prod(shape.get(a, 1) for a in as_axes(axes))

    def constrain(self, x: jax.Array, *entries: Any) -> jax.Array:
        """`x` laid out by a PartitionSpec's entries, if there is a mesh."""
        if self.mesh.empty:
            return x
        known = [tuple(a for a in as_axes(e) if self.size(a) > 1) or None for e in entries]
        spec = PartitionSpec(*known)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def here() -> Here:
    """Where the code being traced will run."""
    mesh = jax.sharding.get_abstract_mesh()
    rules = {name: as_axes(value) for name, value in nn.get_logical_axis_rules()}
    shape = dict(mesh.shape)
    batch = rules.get("batch", BATCH_AXES)
    return Here(mesh, tuple(a for a in batch if shape.get(a, 1) > 1))
