"""Where replica-local arrays live: a leading dim, one row per replica, sharded over `data`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

AXIS = "data"
"""The mesh axis whose members are the replicas."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReplicaState:
    """What the replicas keep besides the training state; part of every checkpoint.

    The three kinds say what happens when a checkpoint is restored on another number of replicas.

    Args:
      copies: `[R, ...]`: each replica's own version of something (parameters, moments). New
        replicas all start from the mean of the old.
      parts: `[R, ...]`: what adds up over replicas (unsent gradients, rounding errors, example
        counts). Each new replica gets an equal part of the old sum.
      shared: Alike on all replicas; kept. (`shardtrain.sync.reshard` is the whole rule.)
    """

    copies: Any = None
    parts: Any = None
    shared: Any = None


@dataclass(frozen=True)
class Replicas:
    """The replicas of a plan.

    Args:
      mesh: The mesh; its axis `data` counts the replicas.
      specs: Params-shaped tree: how one replica's version is sharded over the other axes.
      hosts: Groups of replicas with a slower network between them.
    """

    mesh: Any
    specs: Any
    hosts: int = 1

    @property
    def count(self) -> int:
        """Number of replicas, R."""
        return self.mesh.shape[AXIS]

    @property
    def alone(self) -> bool:
        """Whether every replica is one device: no other mesh axis is in use."""
        return self.mesh.size == self.count

    def stacked(self, specs: Any = None) -> Any:
        """Specs of params-shaped trees with a leading replica dim."""
        return jax.tree.map(
            lambda s: PartitionSpec(AXIS, *s), self.specs if specs is None else specs
        )

    def shard_shape(self, shape: tuple[int, ...], spec: PartitionSpec) -> tuple[int, ...]:
        """Shape of one device's shard of one replica's array."""
        parts = [self.axis_size(entry) for entry in spec]
        parts += [1] * (len(shape) - len(parts))
        return tuple(n // p for n, p in zip(shape, parts, strict=True))

    def axis_size(self, entry: Any) -> int:
        """Product of the mesh axes named in one entry of a spec."""
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return math.prod(self.mesh.shape[a] for a in names)

    def on_devices(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`fn` on every device's own shards, with the collectives it writes itself."""
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def broadcast(tree: Any, count: int) -> Any:
    """`[R, ...]`: the same values for every replica."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), tree)


def map_replicas(
    fn: Callable[..., Any], replicas: Replicas, own: tuple[Any, ...]
) -> Callable[..., Any]:
    """`fn(index, *args)` for every replica on its own: nothing is communicated between them.

    Where `data` is the only axis, each device runs `fn` as plain single-device code; else the
    compiler splits each replica over the other axes (`jax.vmap` over the replicas).

    Args:
      fn: Called with the replica's index, an int32 scalar, and its own `args`.
      replicas: How many, on which mesh.
      own: Per argument True (it has a leading replica dim), False (the same for all), or a tree of
        these with the argument's structure.

    Returns:
      A function of `args` whose results all have a leading replica dim.
    """
    numbers = np.arange(replicas.count, dtype=np.int32)
    if not replicas.alone:
        in_axes = (0, *(jax.tree.map(lambda a: 0 if a else None, axes) for axes in own))
        mapped = jax.vmap(fn, in_axes=in_axes, out_axes=0, spmd_axis_name=AXIS)
        return lambda *args: mapped(numbers, *args)

    def on_one(*args: Any) -> Any:
        found = fn(*(_first(a, axes) for a, axes in zip(args, (True, *own), strict=True)))
        return jax.tree.map(lambda x: x[None], found)

    def mapped_alone(*args: Any) -> Any:
        specs = tuple(_specs(a, axes) for a, axes in zip(args, own, strict=True))
        every = replicas.on_devices(on_one, (PartitionSpec(AXIS), *specs), PartitionSpec(AXIS))
        return every(numbers, *args)

    return mapped_alone


def _each(tree: Any, own: Any) -> Any:
    """One entry per leaf: whether it has a replica dim."""
    return jax.tree.map(lambda _: own, tree) if isinstance(own, bool) else own


def _first(tree: Any, own: Any) -> Any:
    return jax.tree.map(lambda x, o: x[0] if o else x, tree, _each(tree, own))


def _specs(tree: Any, own: Any) -> Any:
    return jax.tree.map(
        lambda _, o: PartitionSpec(AXIS) if o else PartitionSpec(), tree, _each(tree, own)
    )
