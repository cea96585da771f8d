"""First-batch audit: did every process deliver its own rows, and replicas the same ones?

The two classic mistakes of per-process input pipelines leave a normal-looking loss curve: all
processes shuffle with one seed and feed the same examples, or processes that hold copies of the
same rows (their devices differ along `tensor` or `pipeline`) feed different ones.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from shardtrain.errors import DataError

Exchange = Callable[[np.ndarray], np.ndarray]
"""This process's array `[...]` → all processes' `[process_count, ...]`."""


def audit_first_batch(
    batch: Any,
    process_index: int | None = None,
    process_count: int | None = None,
    exchange: Exchange = multihost_utils.process_allgather,
) -> None:
    """Compare the rows that the processes delivered; all processes must call it together.

    Args:
        batch: pytree of global `jax.Array`s with a leading dim of rows.
        process_index: of this process; default `jax.process_index()`.
        process_count: default `jax.process_count()`; with 1 there is nothing to compare.
        exchange: gathers one small uint32 array from each process.

    Raises:
        DataError: two processes own different rows but delivered identical data, or hold the same
            rows and delivered different data. Names both processes, the leaf and the hash.
    """
    count = jax.process_count() if process_count is None else process_count
    index = jax.process_index() if process_index is None else process_index
    if count == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    records = [_record(i, shard) for i, (_, leaf) in enumerate(leaves) for shard in _unique(leaf)]
    mine = np.asarray(records, np.uint32)
    longest = int(np.max(exchange(np.asarray([len(mine)], np.uint32))))
    padded = np.zeros((longest, mine.shape[1]), np.uint32)
    padded[: len(mine)] = mine
    tables = np.asarray(exchange(padded))
    if not np.array_equal(tables[index], padded):
        raise DataError(f"the exchange returned other data for process {index} than it sent.")
    _compare([_Delivered.parse(table) for table in tables], names)


class _Delivered:
    """What one process delivered: `hashes[leaf, region]`, and the part that is worth comparing."""

    def __init__(self, hashes: dict[tuple[int, int], int], varied: dict[int, list[int]]):
        self.hashes = hashes
        self.varied = varied

    @classmethod
    def parse(cls, table: np.ndarray) -> "_Delivered":
        hashes: dict[tuple[int, int], int] = {}
        varied: dict[int, list[int]] = {}
        for used, leaf, region_high, region_low, high, low, is_varied in table.tolist():
            if used:
                digest = high << 32 | low
                hashes[leaf, region_high << 32 | region_low] = digest
                if is_varied:
                    varied.setdefault(leaf, []).append(digest)
        return cls(hashes, varied)


def _compare(delivered: list[_Delivered], names: list[str]) -> None:
    pairs = [(p, q) for p in range(len(delivered)) for q in range(p + 1, len(delivered))]
    for p, q in pairs:
        one, other = delivered[p], delivered[q]
        shared = one.hashes.keys() & other.hashes.keys()
        for leaf, region in sorted(shared):
            a, b = one.hashes[leaf, region], other.hashes[leaf, region]
            if a != b:
                raise DataError(
                    f"processes {p} and {q} hold the same rows of batch leaf {names[leaf]} but "
                    f"delivered different data (hashes {a:016x} and {b:016x}). Their devices "
                    "differ along a mesh axis that does not divide the batch: both must read the "
                    "same rows."
                )
        if not shared and one.varied and one.varied == other.varied:
            digest = next(iter(one.varied.values()))[0]
            raise DataError(
                f"processes {p} and {q} own different rows of the batch but delivered identical "
                f"data (hash {digest:016x}). Did you forget to shard the input by "
                "jax.process_index()? shardtrain.DataLoader does it by itself."
            )


def _unique(leaf: jax.Array) -> list[Any]:
    """The addressable shards of `leaf`, one per distinct region, in a fixed order."""
    regions = {str(shard.index): shard for shard in leaf.addressable_shards}
    return [regions[region] for region in sorted(regions)]


def _record(leaf: int, shard: Any) -> list[int]:
    data = np.asarray(shard.data)
    # values that are all alike (padding, masks of ones) say nothing about who read them
    varied = bool((data != data.flat[0]).any()) if data.size else False
    region = [(piece.start or 0, piece.stop) for piece in shard.index]
    return [1, leaf, *_digest(repr(region).encode()), *_digest(data.tobytes()), int(varied)]


def _digest(data: bytes) -> tuple[int, int]:
    value = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(value[:4], "big"), int.from_bytes(value[4:], "big")
