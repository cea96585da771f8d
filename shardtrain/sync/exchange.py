"""The exchange: sums of params-shaped trees over replicas, with a compression and its memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.algorithms import PowerSGD, TopK
from shardtrain.sync.codecs import make_codec
from shardtrain.sync.replicas import AXIS, Replicas, ReplicaState
from shardtrain.sync.sums import as_matrix, coded_sum, dense_sum, low_rank_sum, sparse_sum


@dataclass(frozen=True)
class Exchange:
    """How trees are summed over replicas.

    Args:
      init: `(params) -> ReplicaState`: nothing left out yet.
      specs: `(params) -> ReplicaState` of PartitionSpecs.
      run: `(tree[R, ...], memory) -> (sums, memory)`; the sums are float32.
    """

    init: Callable[[Any], ReplicaState]
    specs: Callable[[Any], ReplicaState]
    run: Callable[[Any, ReplicaState], tuple[Any, ReplicaState]]


def make_exchange(compression: Any, replicas: Replicas) -> Exchange:
    """The exchange of a compression; None sends float32.

    Args:
      compression: `Int8()` and the like, or None.
      replicas: Where the trees live.

    Example:
      >>> from jax.sharding import AxisType
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> exchange = make_exchange(None, Replicas(mesh, {"w": PartitionSpec()}))
      >>> sums, _ = exchange.run({"w": jnp.ones((1, 3))}, ReplicaState())
      >>> sums["w"].tolist()
      [1.0, 1.0, 1.0]
    """
    feedback = compression is not None and compression.error_feedback

    def init(params: Any) -> ReplicaState:
        error = lambda x: jnp.zeros((replicas.count, *x.shape), jnp.float32)
        parts = jax.tree.map(error, params) if feedback else None
        return ReplicaState(parts=parts, shared=_first_factors(compression, replicas, params))

    def specs(params: Any) -> ReplicaState:
        factors = _factor_specs(compression, replicas, params)
        return ReplicaState(parts=replicas.stacked() if feedback else None, shared=factors)

    def run(tree: Any, memory: ReplicaState) -> tuple[Any, ReplicaState]:
        leaves, structure = jax.tree.flatten(tree)
        errors = jax.tree.leaves(memory.parts)
        body = lambda xs, left, warm: _on_device(compression, replicas, xs, left, warm)
        inner = jax.tree.leaves(replicas.specs)
        outer = [PartitionSpec(AXIS, *s) for s in inner]
        memory_specs = (outer if feedback else [], _factor_specs(compression, replicas, tree, 1))
        sums, left, warm = replicas.on_devices(
            body, (outer, *memory_specs), (inner, *memory_specs)
        )(leaves, errors, memory.shared or [])
        parts = structure.unflatten(left) if feedback else None
        return structure.unflatten(sums), ReplicaState(parts=parts, shared=warm)

    return Exchange(init, specs, run)


def _on_device(compression: Any, replicas: Replicas, xs: Any, errors: Any, warm: Any) -> Any:
    mine = [x[0].astype(jnp.float32) for x in xs]
    if errors:
        mine = [x + e[0] for x, e in zip(mine, errors, strict=True)]
    left: list[Any] = []
    codec = make_codec(compression)
    if codec is not None:
        sums, left = coded_sum(mine, replicas.count, codec)
    elif isinstance(compression, TopK):
        sums, left = sparse_sum(mine, compression.fraction)
    elif isinstance(compression, PowerSGD):
        sums, left, factors = low_rank_sum(mine, [q[0] for q in warm], compression.rank)
        warm = [q[None] for q in factors]
    else:
        sums = dense_sum(mine, replicas.count, replicas.hosts)
    return sums, [e[None] for e in left] if errors else [], warm


def _factored(compression: Any, replicas: Replicas, tree: Any, skip: int) -> list[Any]:
    """`(columns of the whole array, its spec)` of each array that is sent as a product."""
    if not isinstance(compression, PowerSGD):
        return []
    found = []
    for x, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(replicas.specs), strict=True):
        shape = tuple(x.shape[skip:])
        if as_matrix(replicas.shard_shape(shape, spec), compression.rank) is not None:
            found.append((shape[-1], [*spec, *[None] * (len(shape) - len(spec))]))
    return found


def _factor_specs(compression: Any, replicas: Replicas, tree: Any, skip: int = 0) -> Any:
    """Factors are `[devices along the rows, columns, rank]`: each shard has its own."""
    specs = []
    for _, entries in _factored(compression, replicas, tree, skip):
        rows = tuple(a for e in entries[:-1] for a in _names(e))
        specs.append(PartitionSpec(rows or None, entries[-1], None))
    return specs


def _first_factors(compression: Any, replicas: Replicas, params: Any) -> Any:
    factors = []
    for n, (columns, entries) in enumerate(_factored(compression, replicas, params, 0)):
        count = replicas.axis_size(tuple(a for e in entries[:-1] for a in _names(e)))
        shape = (columns, compression.rank)
        first = jax.random.normal(jax.random.fold_in(jax.random.key(0), n), shape)
        factors.append(jnp.broadcast_to(first, (count, *shape)))
    return factors


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
