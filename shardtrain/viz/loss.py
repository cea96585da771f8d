"""The loss curve of a run."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardtrain.viz.figure import Picture

TRAIN, HELD_OUT = "#4c78a8", "#e45756"


def loss_figure(records: Sequence[Mapping[str, Any]], title: str = "") -> Picture:
    """Training loss per step, smoothed too, and held-out loss.

    Args:
      records: As in `metrics.jsonl` (`kind`, `step`, `loss`), or `FitResult.history` (no `kind`).
      title: Above the axes.

    Returns:
      A matplotlib figure; no window, no pyplot state.

    Example:
      >>> figure = loss_figure([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
      >>> figure.axes[0].get_xlabel()
      'step'
    """
    figure = Picture(7, 4)
    axes = figure.add_subplot()
    steps, losses = _points(records, "step")
    if steps:
        axes.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(losses), color=TRAIN, linewidth=2, label="training")
    at, held_out = _points(records, "eval")
    if at:
        axes.plot(at, held_out, "o-", color=HELD_OUT, markersize=5, label="held out")
        axes.annotate(
            f"{held_out[-1]:.2f}",
            (at[-1], held_out[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=HELD_OUT,
        )
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.set_title(textwrap.fill(title, 72), fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if steps or at:
        axes.legend(frameon=False)
    return figure


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, unbiased at the start (as in Adam, Kingma and Ba 2015).

    Example:
      >>> smooth([2.0, 2.0, 2.0])
      [2.0, 2.0, 2.0]
    """
    average, norm, out = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(round(average / norm, 12))
    return out


def _points(records: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    chosen = [
        (r["step"], r["loss"])
        for r in records
        if r.get("kind", "step") == kind and r["loss"] is not None and math.isfinite(r["loss"])
    ]
    order = np.argsort([step for step, _ in chosen], kind="stable")
    return [chosen[i][0] for i in order], [chosen[i][1] for i in order]
