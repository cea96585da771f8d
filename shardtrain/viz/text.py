"""Drawings made of characters: meshes and memory, for terminals and logs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shardtrain.tables import bytes_text

_MAX_ROWS = 16
_MAX_WIDTH = 70


def mesh_text(mesh: Any) -> str:
    """A mesh as a grid: the last axis across, the others down; each cell a device id.

    Args:
      mesh: A `jax.sharding.Mesh`, or an abstract one, whose devices are numbered in order.

    Example:
      >>> from shardtrain.mesh import abstract_mesh
      >>> from shardtrain.strategy import Strategy
      >>> print(mesh_text(abstract_mesh(Strategy(data=2, tensor=2), 4)))
              tensor 0  tensor 1
      data 0         0         1
      data 1         2         3
    """
    sizes = {name: size for name, size in dict(mesh.shape).items() if size > 1}
    if not sizes:
        return "one device"
    grid = device_ids(mesh).reshape(tuple(sizes.values()))
    *outer, last = sizes
    columns = [f"{last} {i}" for i in range(sizes[last])]
    rows = _row_labels([(name, sizes[name]) for name in outer])
    cells = grid.reshape(len(rows), -1)
    shown_rows = _middle_out(len(rows), _MAX_ROWS)
    width = max(len(rows[i]) for i in shown_rows if i is not None)
    fits = (_MAX_WIDTH - width) // (max(map(len, columns)) + 2)
    shown_columns = _middle_out(len(columns), max(fits, 3))
    lines = [_line("", [_cell(columns, j) for j in shown_columns], columns, width)]
    for i in shown_rows:
        if i is None:
            lines.append("...".ljust(width))
            continue
        lines.append(_line(rows[i], [_cell(cells[i], j) for j in shown_columns], columns, width))
    return "\n".join(line.rstrip() for line in lines)


def device_ids(mesh: Any) -> np.ndarray:
    """Device ids in the shape of the mesh; an abstract mesh numbers its devices in order."""
    shape = tuple(dict(mesh.shape).values())
    if not isinstance(mesh, jax.sharding.Mesh):
        return np.arange(math.prod(shape)).reshape(shape)
    return np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)


def _row_labels(axes: Sequence[tuple[str, int]]) -> list[str]:
    """`data 0 fsdp 1` per row; a coordinate that did not change is left blank."""
    labels, previous = [], None
    for index in np.ndindex(*(size for _, size in axes)):
        changed = 0 if previous is None else _first_change(previous, index)
        parts = [f"{name} {i}" for (name, _), i in zip(axes, index, strict=True)]
        labels.append(" ".join(" " * len(p) if k < changed else p for k, p in enumerate(parts)))
        previous = index
    return labels


def _first_change(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    return next(k for k, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)


def _middle_out(count: int, limit: int) -> list[Any]:
    """All indices, or the first ones, None for what is left out, and the last."""
    return [*range(count)] if count <= limit else [*range(limit - 2), None, count - 1]


def _cell(values: Any, index: int | None) -> str:
    return "..." if index is None else str(values[index])


def _line(label: str, cells: Sequence[str], columns: Sequence[str], width: int) -> str:
    wide = max(map(len, columns))
    return label.ljust(width) + "".join("  " + c.rjust(wide) for c in cells)


def memory_text(parts: Mapping[str, int], limit: float | None = None, width: int = 40) -> str:
    """Bytes on one device as bars.

    Args:
      parts: Name -> bytes.
      limit: Bytes the device has; bars are then shares of it.
      width: Characters of the longest bar.

    Example:
      >>> print(memory_text({"params": 1024, "grads": 512}, width=8))
      params  ████████  1.0 KiB
      grads   ████        512 B
    """
    largest = limit or max([*parts.values(), 1])
    names = max(map(len, parts))
    texts = {name: bytes_text(value) for name, value in parts.items()}
    number = max(map(len, texts.values()))
    lines = [
        f"{name.ljust(names)}  {_bar(value / largest, width).ljust(width)}  {texts[name]:>{number}}"
        for name, value in parts.items()
    ]
    if limit is not None:
        total = sum(parts.values())
        said = f"{bytes_text(total)} of {bytes_text(limit)} ({total / limit:.0%})"
        lines.append(f"{'total'.ljust(names)}  {said}")
    return "\n".join(lines)


def _bar(share: float, width: int) -> str:
    eighths = round(min(share, 1.0) * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
