"""What this machine really does: matmul, memory, links, host copies, disk.

All devices work at once, so that a rate is what each has while the others are busy (virtual CPU
devices share cores). Every figure is the median of a few repetitions after one to warm up.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

REPEATS = 3


@dataclass(frozen=True)
class Sizes:
    """How much work a measurement does.

    Attributes:
        matmul: side of the matrices.
        array: bytes of each device's array.
        file: bytes of the file.
    """

    matmul: int
    array: int
    file: int


CPU = Sizes(512, 2**24, 2**26)
ACCELERATOR = Sizes(8192, 2**28, 2**28)


@dataclass(frozen=True)
class Link:
    """An all-reduce over one mesh axis.

    Attributes:
        axis: the mesh axis.
        size: devices in a group.
        bandwidth: bytes/s that each device sends, ring convention: 2 (n-1)/n of the array.
        latency: seconds of a tiny one.
    """

    axis: str
    size: int
    bandwidth: float
    latency: float


def seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of a call, its result waited for."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _spread(devices: Sequence[jax.Device], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`[devices, *shape]` of ones, one part on each device."""
    mesh = Mesh(np.array(devices), ("all",))
    make = jax.jit(
        lambda: jnp.ones((len(devices), *shape), dtype), out_shardings=NamedSharding(mesh, P("all"))
    )
    return make()


def matmul_rate(devices: Sequence[jax.Device], size: int, dtype: Any) -> float:
    """FLOP/s of each device on a `size` x `size` matmul, all devices at once."""
    x = _spread(devices, (size, size), dtype)
    multiply = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x))
    return 2 * size**3 / seconds(lambda: multiply(x))


def memory_bandwidth(devices: Sequence[jax.Device], size: int) -> float:
    """Bytes/s each device reads and writes when it scales an array of `size` bytes."""
    x = _spread(devices, (size // 4,), jnp.float32)
    scale = jax.jit(lambda x: x * 1.5)
    return 2 * size / seconds(lambda: scale(x))


def link_rates(devices: Sequence[jax.Device], axes: Mapping[str, int], size: int) -> list[Link]:
    """An all-reduce over each axis of a mesh.

    Args:
        devices: in mesh order; as many as the axes multiply to.
        axes: mesh axis -> size.
        size: bytes of each device's array.
    """
    mesh = Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes))
    found = []
    for axis, count in axes.items():
        if count == 1:
            continue
        times = []
        for elements in (64, size // 4):
            x = _spread(list(mesh.devices.flat), (elements,), jnp.float32)
            x = jax.device_put(x, NamedSharding(mesh, P(tuple(axes))))
            total = partial(jax.lax.psum, axis_name=axis)
            reduce = jax.jit(
                jax.shard_map(total, mesh=mesh, in_specs=P(tuple(axes)), out_specs=P(tuple(axes)),
                              check_vma=False)
            )  # fmt: skip
            times.append(seconds(partial(reduce, x)))
        moved = 2 * (count - 1) / count * size
        found.append(Link(axis, count, moved / max(times[1] - times[0], 1e-9), times[0]))
    return found


def host_copy_rates(device: jax.Device, size: int) -> tuple[float, float]:
    """(host to device, device to host) bytes/s of one device."""
    host = np.ones(size // 4, np.float32)
    there = seconds(lambda: jax.device_put(host, device))
    base = jax.device_put(host, device)
    fresh = iter([jax.block_until_ready(base + n) for n in range(REPEATS + 1)])
    back = seconds(lambda: np.array(next(fresh)))  # an array keeps its host copy: new ones
    return size / there, size / back


def disk_rates(directory: str | Path, size: int) -> tuple[float, float]:
    """(write and flush, read) bytes/s of a file in a directory; reading may come from its cache."""
    data = os.urandom(2**20) * (size // 2**20)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="shardtrain-doctor-") as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        start = time.perf_counter()
        Path(file.name).read_bytes()
        read = time.perf_counter() - start
    return size / written, size / read
