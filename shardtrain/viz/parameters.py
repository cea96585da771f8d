"""Parameters on a mesh: how each array is cut, and which devices hold each piece."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from shardtrain.partitioning.rules import as_axes
from shardtrain.tables import bytes_text
from shardtrain.viz.figure import Picture
from shardtrain.viz.mesh import palette
from shardtrain.viz.text import device_ids

_MAX_TEXT = 16


def parameters_figure(plan: Any, limit: int = 6) -> Picture:
    """The largest kinds of parameters, cut into their shards.

    Each piece carries the ids of the devices that hold it: one id is fully sharded, several are
    copies. Repeated layers are drawn once.

    Args:
      plan: From `st.plan`.
      limit: How many to draw.
    """
    leaves: dict[str, Any] = {}
    for leaf in sorted(plan.layout.params.values(), key=lambda leaf: -leaf.nbytes):
        leaves.setdefault(re.sub(r"\d+", "*", leaf.path), leaf)
    chosen = list(leaves.items())[:limit]
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = Picture(3.6 * columns, 2.6 * rows)
    for number, (path, leaf) in enumerate(chosen, start=1):
        axes = figure.add_subplot(rows, columns, number)
        spec = leaf.spec(plan.strategy.zero == 3)
        draw_array(axes, leaf.shape, spec, plan.mesh)
        pieces = math.prod(plan.layout.sizes[a] for entry in spec for a in as_axes(entry))
        held = bytes_text(leaf.nbytes / pieces)
        split = ", ".join("+".join(as_axes(e)) or "-" for e in _padded(spec, len(leaf.shape)))
        axes.set_title(f"{path}\n{leaf.shape}: {split}; {held} each", fontsize=7)
    return figure


def draw_array(axes: Any, shape: Sequence[int], spec: Any, mesh: Any) -> None:
    """One array as a rectangle cut into shards; dims that are not cut are not drawn apart."""
    down, across = drawn_dims(shape, spec)
    held = holders(spec, len(shape), mesh)
    sizes = dict(mesh.shape)
    parts = [math.prod(sizes[a] for a in as_axes(e)) for e in _padded(spec, len(shape))]
    rows, columns = (parts[d] if d is not None else 1 for d in (down, across))
    # One colour per first holder: the same devices have the same colour in every array.
    everyone = sorted(int(i) for i in np.ravel(device_ids(mesh)))
    colors = dict(zip(everyone, palette(len(everyone)), strict=True))
    for index, ids in sorted(held.items()):
        row = index[down] if down is not None else 0
        column = index[across] if across is not None else 0
        box = ((column / columns, row / rows), 1 / columns, 1 / rows)
        axes.add_patch(Rectangle(*box, facecolor=colors[ids[0]], edgecolor="white", linewidth=1.5))
        if len(held) <= _MAX_TEXT:
            text = ", ".join(map(str, ids)) if len(ids) <= 8 else f"{len(ids)} devices"
            place = ((column + 0.5) / columns, (row + 0.5) / rows)
            axes.text(*place, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"dim {down}" if down is not None else "", fontsize=7)
    axes.set_xlabel(f"dim {across}" if across is not None else "", fontsize=7)


def drawn_dims(shape: Sequence[int], spec: Any) -> tuple[int | None, int | None]:
    """Two dims to draw, down and across: those that are cut, then the first ones."""
    cut = [d for d, entry in enumerate(_padded(spec, len(shape))) if as_axes(entry)]
    others = [d for d in range(len(shape)) if d not in cut]
    chosen = sorted([*cut, *others][:2])
    if len(chosen) == 1:
        return None, chosen[0]
    return (chosen[0], chosen[1]) if chosen else (None, None)


def holders(spec: Any, rank: int, mesh: Any) -> Mapping[tuple[int, ...], list[int]]:
    """Shard index per dim -> ids of the devices that hold this shard.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> from shardtrain.mesh import abstract_mesh
      >>> from shardtrain.strategy import Strategy
      >>> holders(P("tensor"), 1, abstract_mesh(Strategy(data=2, tensor=2), 4))
      {(0,): [0, 2], (1,): [1, 3]}
    """
    ids = device_ids(mesh)
    names = list(dict(mesh.shape))
    entries = [as_axes(entry) for entry in _padded(spec, rank)]
    sizes = dict(mesh.shape)
    found = {}
    for index in itertools.product(*(range(math.prod(sizes[a] for a in e)) for e in entries)):
        where: list[Any] = [slice(None)] * len(names)
        for axes_of_dim, part in zip(entries, index, strict=True):
            split = np.unravel_index(part, [sizes[a] for a in axes_of_dim]) if axes_of_dim else ()
            for axis, position in zip(axes_of_dim, split, strict=True):
                where[names.index(axis)] = int(position)
        found[index] = sorted(int(i) for i in np.ravel(ids[tuple(where)]))
    return found


def _padded(spec: Any, rank: int) -> list[Any]:
    return [*spec, *[None] * (rank - len(spec))]
