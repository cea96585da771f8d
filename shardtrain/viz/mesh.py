"""A mesh as a picture: one cell per device, coloured by the rows of the batch it reads."""

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from shardtrain.partitioning.rules import BATCH_AXES
from shardtrain.viz.figure import Picture
from shardtrain.viz.text import device_ids

_MAX_CELLS = 1024


def mesh_figure(mesh: Any, title: str = "") -> Picture:
    """Devices as a grid: the last axis of size > 1 across, the others down.

    Cells of one colour read the same rows of each batch.

    Args:
      mesh: A `jax.sharding.Mesh` or an abstract one, at most 1024 devices.
      title: Above the grid.

    Example:
      >>> from shardtrain.mesh import abstract_mesh
      >>> from shardtrain.strategy import Strategy
      >>> figure = mesh_figure(abstract_mesh(Strategy(data=2, tensor=2), 4))
      >>> len(figure.axes[0].patches)
      4
    """
    names = [name for name, size in dict(mesh.shape).items() if size > 1] or ["data"]
    sizes = [dict(mesh.shape)[name] for name in names]
    if math.prod(sizes) > _MAX_CELLS:
        raise ValueError(f"a picture of {math.prod(sizes)} devices cannot be read; use mesh_text")
    columns, rows = sizes[-1], math.prod(sizes[:-1])
    grid = device_ids(mesh).reshape(rows, columns)
    figure = Picture(min(1.6 + 0.9 * columns, 14), min(1.2 + 0.55 * rows, 12))
    axes = figure.add_subplot()
    shards = batch_shards(names, sizes)
    colors = palette(int(shards.max()) + 1)
    for row, column in np.ndindex(rows, columns):
        corner = (column + 0.04, row + 0.06)
        color = colors[shards.reshape(rows, columns)[row, column]]
        axes.add_patch(Rectangle(corner, 0.92, 0.88, facecolor=color, edgecolor="none"))
        axes.text(column + 0.5, row + 0.5, str(grid[row, column]), ha="center", va="center")
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks(np.arange(columns) + 0.5, [f"{names[-1]} {i}" for i in range(columns)])
    labels = [
        ", ".join(f"{n} {i}" for n, i in zip(names[:-1], index, strict=True))
        for index in np.ndindex(*sizes[:-1])
    ]
    axes.set_yticks(np.arange(rows) + 0.5, labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title or " x ".join(f"{n} {s}" for n, s in zip(names, sizes, strict=True)))
    axes.set_xlabel("same colour: same rows of each batch", fontsize=8, color="0.4")
    return figure


def batch_shards(names: list[str], sizes: list[int]) -> np.ndarray:
    """Which part of the batch each device reads, in the shape of the mesh."""
    index = np.indices(sizes)
    found = np.zeros(sizes, int)
    for axis, name in enumerate(names):
        if name in BATCH_AXES:
            found = found * sizes[axis] + index[axis]
    return found


def palette(count: int) -> list[Any]:
    """Light colours that black text is readable on."""
    if count <= 8:
        return [colormaps["Set2"](i) for i in range(max(count, 1))]
    return [
        colormaps["Pastel1" if count <= 9 else "rainbow"](i / (count - 1)) for i in range(count)
    ]
