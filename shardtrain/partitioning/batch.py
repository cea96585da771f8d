"""Where the rows, sequence positions and features of a batch go."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import PartitionSpec

from shardtrain.errors import BatchError, IndivisibleError
from shardtrain.partitioning.rules import BATCH_AXES, as_axes, glob_rule
from shardtrain.pytree import leaves_by_path, map_with_path
from shardtrain.strategy import Strategy


def batch_specs(
    batch: Any,
    strategy: Strategy,
    sizes: Mapping[str, int],
    sequence_dims: Mapping[str, int] | None = None,
) -> Any:
    """A PartitionSpec for each leaf of a batch.

    Dim 0 goes over the batch axes (`data`, `fsdp`, `expert`), the sequence dim over `context`. A
    rule for
    `batch/<path>` overrides, e.g. `rules={"batch/image": (("data", "fsdp"), None, "tensor")}`.

    Args:
      batch: Abstract arrays; scalars are replicated.
      strategy: Rules and the number of microbatches.
      sizes: Mesh axis sizes.
      sequence_dims: Batch path -> its sequence dim, as inferred; None: dim 1 of every leaf.

    Raises:
      BatchError: Not divisible; names the leaf and the nearest batch sizes that work.
    """
    shards = math.prod(sizes[a] for a in BATCH_AXES)
    ruled = lambda path: glob_rule("batch/" + path, strategy.rules) is not None
    _check_rows(batch, shards, strategy.num_microbatches, ruled)

    def spec(path: str, leaf: Any) -> PartitionSpec:
        shape = tuple(leaf.shape)
        glob = glob_rule("batch/" + path, strategy.rules)
        if glob is not None:
            entries = [tuple(a for a in as_axes(e) if sizes[a] > 1) for e in glob[1]]
        else:
            entries = [tuple(a for a in BATCH_AXES if sizes[a] > 1)] if shape else []
            dim = 1 if sequence_dims is None else sequence_dims.get(path, 0)
            if 0 < dim < len(shape) and sizes["context"] > 1:
                entries += [()] * (dim - 1) + [("context",)]
        _check_dims(path, shape, entries, sizes)
        return PartitionSpec(*[e[0] if len(e) == 1 else (e or None) for e in entries])

    return map_with_path(spec, batch)


def _check_rows(
    batch: Any, shards: int, num_microbatches: int, ruled: Callable[[str], bool]
) -> None:
    rows = {p: leaf.shape[0] for p, leaf in leaves_by_path(batch).items() if leaf.shape}
    if not rows:
        raise BatchError("the batch has no array with a batch dim")
    if num_microbatches > 1 and len(set(rows.values())) > 1:
        raise BatchError(
            f"num_microbatches={num_microbatches} splits dim 0 of every array, but they differ: "
            + ", ".join(f"{p}: {n}" for p, n in rows.items())
        )
    unit = shards * num_microbatches
    for path, count in rows.items():
        # A rule may keep a leaf whole (class weights): `_check_dims` checks what it asks for.
        if count % (num_microbatches if ruled(path) else unit):
            low, high = count // unit * unit, -(-count // unit) * unit
            near = f"{low} or {high}" if low else f"{high}"
            raise BatchError(
                f"batch leaf {path or 'batch'}: dim 0 = {count} rows is not divisible by {shards} "
                f"batch shards ({' x '.join(BATCH_AXES)}) x {num_microbatches} microbatches = "
                f"{unit}. Nearest batch sizes that work: {near}"
            )


def _check_dims(path: str, shape: tuple[int, ...], entries: list, sizes: Mapping[str, int]) -> None:
    if len(entries) > len(shape):
        raise BatchError(f"rule for batch/{path}: {len(entries)} entries for shape {shape}")
    for dim, axes in enumerate(entries):
        parts = math.prod(sizes[a] for a in axes)
        if shape[dim] % parts:
            asked = " x ".join(f"{a}={sizes[a]}" for a in axes)
            raise IndivisibleError(
                f"batch leaf {path} {shape}: dim {dim} = {shape[dim]} is not divisible by {asked}. "
                f"Keep it whole with Strategy(rules={{'batch/{path}': (('data', 'fsdp'),)}})"
            )


def leaf_names(batch: Any) -> list[str]:
    """`batch/<path>` of every leaf, as rules name them."""
    return ["batch/" + p for p in leaves_by_path(batch)]
