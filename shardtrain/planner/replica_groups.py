"""Replica groups of HLO collectives, in every syntax, as mesh axes.

A collective names its groups by *logical device position*: the place of a device in the
executable's device assignment. JAX makes that assignment from `mesh.devices.flat`, so a position is
a flat index into the mesh whatever the `Device.id`s are (tested with a permuted mesh).

Syntaxes, as printed by XLA's `ReplicaGroup`, `IotaReplicaGroupList` and `MeshAxesReplicaGroupList`:

    replica_groups={{0,1},{2,3}}            lists; {} is one group of all devices
    replica_groups=[2,4]<=[8]               arange(8).reshape(2, 4)
    replica_groups=[4,2]<=[2,4]T(1,0)       arange(8).reshape(2, 4).transpose(1, 0).reshape(4, 2)
    replica_groups=mesh['a'=2,'b'=4] {'b'}  groups vary along b; device_ids=([4,2]T(1,0)) permutes;
                                            'b':(2)2 is the size-2 part of b after its major 2
    source_target_pairs={{0,1},{1,0}}       who sends to whom
"""

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

Groups = list[list[int]]

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,\s]*\}[,\s]*)*)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\((.*?\)?)\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\s*\d+\}[,\s]*)*)\}")


def _integers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def expand_iota(
    dims: Sequence[int], reshape: Sequence[int], transpose: Sequence[int]
) -> np.ndarray:
    """Device positions of the compressed form `[dims]<=[reshape]T(transpose)`.

    Example:
        >>> expand_iota([2, 2], [2, 2], [1, 0]).tolist()
        [[0, 2], [1, 3]]
    """
    positions = np.arange(math.prod(reshape)).reshape(reshape)
    if transpose:
        positions = positions.transpose(transpose)
    return positions.reshape(dims)


def _mesh_devices(sizes: list[int], device_ids: str | None) -> np.ndarray:
    """Positions of a printed mesh: row major, unless `device_ids` lists or permutes them."""
    if not device_ids:
        return np.arange(math.prod(sizes)).reshape(sizes)
    iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", device_ids)
    if iota is None:
        return np.array(_integers(device_ids)).reshape(sizes)
    return expand_iota(sizes, _integers(iota[1]), _integers(iota[2]))


def _expand_mesh(axes_text: str, device_ids: str | None, group_text: str) -> Groups:
    """Groups of the `mesh[...] {...}` form; sub-axes `name:(before)size` split an axis in three."""
    axes = [part.split("=") for part in axes_text.split(",") if part.strip()]
    names = [name.strip(" '\"") for name, _ in axes]
    sizes = [int(size) for _, size in axes]
    chosen = []
    for part in (p for p in group_text.split(",") if p.strip()):
        name, _, sub = part.partition(":")
        before, size = _integers(sub) if sub else (1, sizes[names.index(name.strip(" '\""))])
        chosen.append((names.index(name.strip(" '\"")), before, size))
    # Cut every axis at the borders of the chosen pieces, then bring the chosen cuts to the back.
    fine, is_chosen = [], []
    for axis, size in enumerate(sizes):
        borders = {1, size}
        for index, before, length in chosen:
            if index == axis:
                borders |= {before, before * length}
        ordered = sorted(borders)
        for low, high in itertools.pairwise(ordered):
            fine.append(high // low)
            is_chosen.append(
                any(i == axis and b <= low and high <= b * length for i, b, length in chosen)
            )
    devices = _mesh_devices(sizes, device_ids).reshape(fine or [1])
    back = [d for d, yes in enumerate(is_chosen) if yes]
    front = [d for d, yes in enumerate(is_chosen) if not yes]
    width = math.prod(fine[d] for d in back)
    return devices.transpose([*front, *back] or [0]).reshape(-1, width).tolist()


def parse_replica_groups(attributes: str, num_devices: int) -> Groups | None:
    """Device positions of each group of a collective, or None when no known syntax is present.

    Args:
        attributes: the text after the operands of an HLO collective.
        num_devices: devices of the program, for the empty list that means all of them.
    """
    if match := _IOTA.search(attributes):
        shape, reshape, transpose = (_integers(text) for text in match.groups())
        return expand_iota(shape, reshape, transpose).reshape(-1, shape[-1]).tolist()
    if match := _MESH.search(attributes):
        return _expand_mesh(*match.groups())
    if match := _LISTS.search(attributes):
        groups = [_integers(group) for group in re.findall(r"\{([\d,\s]*)\}", match[1])]
        return [g for g in groups if g] or [list(range(num_devices))]
    return None


def parse_pairs(attributes: str) -> list[tuple[int, int]] | None:
    """Source and target positions of a collective-permute, or None when absent."""
    match = _PAIRS.search(attributes)
    if match is None:
        return None
    numbers = _integers(match[1])
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def varying_axes(groups: Sequence[Sequence[int]], shape: Sequence[int]) -> tuple[int, ...] | None:
    """Dims of a mesh along which members of any group differ.

    Args:
        groups: flat positions in a mesh of this shape.
        shape: sizes of the mesh axes.

    Returns:
        Dims in mesh order, or None when a position lies outside the mesh.
    """
    size, varying = math.prod(shape), np.zeros(len(shape), bool)
    for group in groups:
        positions = np.asarray(group)
        if positions.size and (positions.min() < 0 or positions.max() >= size):
            return None
        coordinates = np.stack(np.unravel_index(positions, tuple(shape)), -1) if shape else None
        if coordinates is not None and len(coordinates):
            varying |= (coordinates != coordinates[0]).any(0)
    return tuple(np.flatnonzero(varying).tolist())


def groups_are_whole(groups: Sequence[Sequence[int]], shape: Sequence[int]) -> bool:
    """Whether each group is all devices along the axes it varies on, the same for all groups."""
    dims = varying_axes(groups, shape)
    if dims is None:
        return False
    width = math.prod(shape[d] for d in dims)
    return all(len(set(group)) == width == len(group) for group in groups)
