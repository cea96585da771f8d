"""Memory of one device as stacked bars, one bar per plan to compare."""

from collections.abc import Mapping
from typing import Any

from shardtrain.tables import bytes_text
from shardtrain.viz.figure import Picture

_PARTS = ("params", "grads", "optimizer", "variables", "batch", "activations")
_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#e45756")


def memory_figure(memories: Mapping[str, Any], limit: float | None = None) -> Picture:
    """Bytes on one device by what they are for.

    Args:
      memories: Label -> what `plan.memory()` returned; several plans make several bars.
      limit: Bytes a device has, drawn as a line.

    Example:
      >>> from shardtrain.plan.views import Memory
      >>> one = Memory(params=10, grads=10, optimizer=20, variables=0, batch=1, activations=5)
      >>> len(memory_figure({"plan": one}).axes)
      1
    """
    figure = Picture(8, 1.4 + 0.5 * len(memories))
    axes = figure.add_subplot()
    mib = 2.0**20
    for row, memory in enumerate(memories.values()):
        left = 0.0
        for part, color in zip(_PARTS, _COLORS, strict=True):
            width = getattr(memory, part) / mib
            axes.barh(row, width, left=left, color=color, height=0.6)
            left += width
        axes.text(left, row, f"  {bytes_text(memory.total)}", va="center")
    for part, color in zip(_PARTS, _COLORS, strict=True):
        if any(getattr(memory, part) for memory in memories.values()):
            axes.barh(0, 0, color=color, label=part)
    if limit is not None:
        axes.axvline(limit / mib, color="0.2", linestyle="--", label=f"limit {bytes_text(limit)}")
    axes.set_yticks(range(len(memories)), list(memories))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("MiB on each device")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, ncols=7, fontsize=8, loc="outside lower center")
    return figure
