"""The picture of a sweep: loss curves, and the value against each number tried."""

from collections.abc import Sequence
from typing import Any

from shardtrain.viz.figure import Picture
from shardtrain.viz.loss import smooth


def sweep_figure(ranked: Sequence[Any], metric: str) -> Picture:
    """Loss curves of all trials, and the value they are ranked by against each number tried.

    Args:
      ranked: Trials, best first: `losses`, `value`, `status`, `hyperparameters`, `number`.
      metric: What `value` is.

    Returns:
      A matplotlib figure.
    """
    import matplotlib as mpl

    kept = [t for t in ranked if t.value is not None and t.status != "failed"]
    numbers = _numbers(kept)
    figure = Picture(4.2 * (1 + len(numbers)), 3.6)
    axes = figure.subplots(1, 1 + len(numbers), squeeze=False)[0]
    colors = mpl.colormaps["viridis"]
    for i, trial in enumerate(reversed(kept)):
        best = i == len(kept) - 1
        color = "#e45756" if best else colors(0.15 + 0.75 * i / max(1, len(kept)))
        label = f"trial {trial.number} (best)" if best else None
        axes[0].plot(smooth(trial.losses), color=color, linewidth=2 if best else 1, label=label)
        for panel, name in zip(axes[1:], numbers, strict=True):
            stopped = trial.status == "stopped"
            panel.plot(
                trial.hyperparameters[name],
                trial.value,
                "o",
                color=color,
                markersize=8 if best else 5,
                markerfacecolor="none" if stopped else color,
            )
    axes[0].set(xlabel="step", ylabel="training loss, smoothed")
    if kept:
        axes[0].legend(frameon=False)
    for panel, name in zip(axes[1:], numbers, strict=True):
        values = [t.hyperparameters[name] for t in kept]
        if min(values) > 0 and max(values) > 20 * min(values):
            panel.set_xscale("log")
        panel.set(xlabel=name, ylabel=metric)
    if len(axes) > 1 and any(t.status == "stopped" for t in kept):
        axes[1].set_title("hollow: stopped early", fontsize=9)
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _numbers(trials: Sequence[Any]) -> list[str]:
    names = dict.fromkeys(n for t in trials for n in t.hyperparameters)
    is_number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    varied = lambda n: len({t.hyperparameters[n] for t in trials}) > 1
    return [n for n in names if all(is_number(t.hyperparameters[n]) for t in trials) and varied(n)]
