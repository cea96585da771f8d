"""Optimizer state follows its parameter: same dims, same shards."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from shardtrain.partitioning.resolve import LeafPlan
from shardtrain.pytree import map_with_path


def optimizer_specs(abstract_state: Any, params: Mapping[str, LeafPlan], sharded: bool) -> Any:
    """A PartitionSpec for each leaf of an optax state.

    A leaf belongs to the parameter whose path ends its own path. Equal shape: the same spec. One
    more dim in front (a history, as L-BFGS keeps): the same behind it. Some dims reduced away
    (Adafactor's rows and columns): the spec without those dims. Anything else (counts,
    schedules): replicated.

    Args:
      abstract_state: `jax.eval_shape(optimizer.init, params)`.
      params: Parameter path -> its plan.
      sharded: Whether the state is sharded over fsdp too (`zero >= 1`).
    """

    def spec(path: str, leaf: Any) -> PartitionSpec:
        owner = _owner(path, params)
        if owner is None:
            return PartitionSpec()
        full = owner.spec(sharded)
        if tuple(leaf.shape) == owner.shape:
            return full
        if tuple(leaf.shape[1:]) == owner.shape:
            return PartitionSpec(None, *full)
        return _reduced(tuple(leaf.shape), owner.shape, full)

    return map_with_path(spec, abstract_state)


def _owner(path: str, params: Mapping[str, LeafPlan]) -> LeafPlan | None:
    parts = path.split("/")
    for start in range(len(parts)):
        found = params.get("/".join(parts[start:]))
        if found is not None:
            return found
    return None


def _reduced(shape: tuple[int, ...], whole: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The spec of an array that kept a subsequence of another's dims."""
    entries = [*spec, *[None] * (len(whole) - len(spec))]
    kept, dim = [], 0
    for size in shape:
        while dim < len(whole) and whole[dim] != size:
            dim += 1
        if dim == len(whole):
            return PartitionSpec()
        kept.append(entries[dim])
        dim += 1
    return PartitionSpec(*kept)
