"""From axis sizes to a device mesh: no device is ever dropped, axis types are always Auto."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from shardtrain.errors import MeshError
from shardtrain.strategy import AXES, Strategy

_AUTO = (AxisType.Auto,) * len(AXES)


def resolve_sizes(strategy: Strategy, num_devices: int) -> dict[str, int]:
    """Axis sizes with -1 filled in, whose product is exactly `num_devices`.

    Raises:
      MeshError: The sizes do not multiply to the device count; lists layouts that would.
    """
    sizes = strategy.sizes
    given = math.prod(s for s in sizes.values() if s != -1)
    if -1 in sizes.values():
        if num_devices % given:
            raise MeshError(_misfit(sizes, num_devices))
        sizes = {n: num_devices // given if s == -1 else s for n, s in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise MeshError(_misfit(sizes, num_devices))
    for name, slices in strategy.dcn.items():
        if sizes[name] % slices:
            raise MeshError(f"dcn {name}={slices} does not divide {name}={sizes[name]}")
    return sizes


def build_mesh(strategy: Strategy, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a strategy over all the given devices (default: all of JAX's).

    Args:
      strategy: Axis sizes, and `dcn` sizes across slices or hosts.
      devices: JAX devices; their network topology decides the order.

    Raises:
      MeshError: The sizes do not multiply to the device count.

    Example:
      >>> build_mesh(Strategy(data=-1, tensor=2)).shape["tensor"]
      2
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve_sizes(strategy, len(devices))
    return Mesh(device_grid(sizes, strategy.dcn, devices), AXES, axis_types=_AUTO)


def abstract_mesh(strategy: Strategy, num_devices: int) -> AbstractMesh:
    """The same mesh without devices, for hardware one does not have."""
    sizes = resolve_sizes(strategy, num_devices)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=_AUTO)


def device_grid(
    sizes: Mapping[str, int], dcn: Mapping[str, int], devices: Sequence[Any]
) -> np.ndarray:
    """Devices arranged as an array with one dim per axis of `sizes`.

    With `dcn`, the given parts of the axes go across slices (TPU) or processes (hosts), and the
    rest stays inside one, where the network is fast.

    Raises:
      MeshError: The devices do not form as many equal slices as `dcn` asks for.
    """
    shape = tuple(sizes.values())
    across = tuple(dcn.get(name, 1) for name in sizes)
    if math.prod(across) > 1:
        inner = tuple(s // d for s, d in zip(shape, across, strict=True))
        groups = _groups(devices)
        if len(groups) != math.prod(across) or len({len(g) for g in groups}) != 1:
            raise MeshError(
                f"dcn={dict(dcn)} asks for {math.prod(across)} slices or hosts, but the devices "
                f"form {len(groups)} with {sorted(len(g) for g in groups)} devices each"
            )
        blocks = np.empty(across, dtype=object)
        for index, group in zip(np.ndindex(*across), groups, strict=True):
            blocks[index] = _inner_grid(inner, group)
        return _join_blocks(blocks, inner)
    return _inner_grid(shape, devices)


def _inner_grid(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    grid = np.empty(len(devices), dtype=object)
    grid[:] = sorted(devices, key=lambda d: (d.process_index, d.id))
    return grid.reshape(shape)


def _groups(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by TPU slice, or by process where there are no slices."""
    key = lambda d: d.process_index
    if len({getattr(d, "slice_index", None) for d in devices}) > 1:
        key = lambda d: d.slice_index
    return [list(g) for _, g in itertools.groupby(sorted(devices, key=key), key=key)]


def _join_blocks(blocks: np.ndarray, inner: tuple[int, ...]) -> np.ndarray:
    """An array of equal blocks as one array: slice-major along every axis."""
    full = np.empty(tuple(b * i for b, i in zip(blocks.shape, inner, strict=True)), dtype=object)
    for index in np.ndindex(*blocks.shape):
        where = tuple(slice(b * i, (b + 1) * i) for b, i in zip(index, inner, strict=True))
        full[where] = blocks[index]
    return full


def layouts(num_devices: int, axes: Iterable[str], limit: int = 6) -> list[str]:
    """Ways to split `num_devices` over the given axes, as strategy strings."""
    axes = list(axes) or ["data"]
    found = [
        combination
        for combination in itertools.product(_divisors(num_devices), repeat=len(axes))
        if math.prod(combination) == num_devices
    ]
    found.sort(key=lambda c: (sum(s == 1 for s in c), max(c)))
    return [",".join(f"{a}={s}" for a, s in zip(axes, c, strict=True)) for c in found[:limit]]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _misfit(sizes: Mapping[str, int], num_devices: int) -> str:
    asked = {n: s for n, s in sizes.items() if s != 1} or {"data": 1}
    product = math.prod(s for s in asked.values() if s != -1)
    shown = " x ".join(f"{n}={s}" for n, s in asked.items())
    if -1 in asked.values():
        said = f"{shown}: the other axes multiply to {product}, which does not divide"
        said += f" {num_devices} devices."
    else:
        said = f"{shown} = {product} devices asked, {num_devices} present."
    options = " | ".join(layouts(num_devices, list(asked)[:3]))
    fill = "" if -1 in asked.values() else f" Or let one axis fill: {next(iter(asked))}=-1."
    more = f" Or st.simulate({product})." if product > num_devices else ""
    return f"{said} Layouts that fit: {options}.{fill}{more}"
