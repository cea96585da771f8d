"""Processes in a ring: each hands bytes to the next. All processes call these together."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_CHUNK = 1 << 26  # bytes sent at a time: bounds the device memory that a transfer needs


def shift(payload: np.ndarray, by: int) -> np.ndarray:
    """The payload of process p - `by`, while this one's goes to process p + `by`.

    Args:
        payload: uint8 `[n]`; n may differ between processes.
        by: +1 or -1 steps around the ring.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return payload
    # 64-bit lengths in two halves, for jax cuts integers to 32 bits
    halves = np.array([len(payload) >> 20, len(payload) & 0xFFFFF], np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(halves)).astype(np.int64)
    lengths = (gathered[:, 0] << 20) + gathered[:, 1]
    received = np.empty(lengths[(index - by) % count], np.uint8)
    mesh = _one_device_per_process()
    for start in range(0, int(lengths.max()), _CHUNK):
        size = min(_CHUNK, int(lengths.max()) - start)
        piece = payload[start : start + size]
        moved = _move(mesh, np.pad(piece, (0, size - len(piece))), by)
        taken = received[start : start + size]
        taken[:] = moved[: len(taken)]
    return received


def _move(mesh: Mesh, piece: np.ndarray, by: int) -> np.ndarray:
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    with jax.set_mesh(mesh):
        placed = jax.make_array_from_process_local_data(sharding, piece)
        return np.asarray(_rotation(mesh, by)(placed).addressable_shards[0].data)


@functools.cache
def _rotation(mesh: Mesh, by: int) -> Any:
    count, spec = mesh.size, PartitionSpec("process")
    pairs = [(i, (i + by) % count) for i in range(count)]
    rotate = functools.partial(jax.lax.ppermute, axis_name="process", perm=pairs)
    return jax.jit(jax.shard_map(rotate, mesh=mesh, in_specs=spec, out_specs=spec))


def _one_device_per_process() -> Mesh:
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    return Mesh(np.array([first[p] for p in sorted(first)]), ("process",))


def gather_steps(mine: Iterable[int], most: int) -> list[set[int]]:
    """Which steps each process has, by process index; the newest `most` of each."""
    newest = sorted(mine)[-most:]
    row = np.array(newest + [-1] * (most - len(newest)), np.int32)
    if jax.process_count() == 1:
        return [set(newest)]
    table = np.asarray(multihost_utils.process_allgather(row))
    return [{int(step) for step in row if step >= 0} for row in table]
