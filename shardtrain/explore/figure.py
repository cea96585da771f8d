"""The figures of an exploration in one picture, for papers and for places that show no HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.explore.choice import Choice, axes_text, seconds_text
from shardtrain.explore.exploration import Exploration
from shardtrain.explore.scatter import SPLITS, pareto, split_of, thinned
from shardtrain.explore.style import GROUPS
from shardtrain.planner.wire import axis_bytes
from shardtrain.viz.figure import Picture

COLOURS = ("#4c78a8", "#e07b1f", "#3f9b5c", "#a45fb0", "#c9a227", "#d1495b", "#7b8794")
AXES = ("fsdp", "data", "tensor", "pipeline", "expert", "context")
SHOWN = 6


def exploration_figure(found: Exploration) -> Picture:
    """Time against memory, time by term, memory by class, bytes by axis.

    Args:
        found: something must fit.

    Raises:
        StrategyError: nothing fits; the message has the cheapest change.

    Example:
        >>> from shardtrain.explore import explore
        >>> len(exploration_figure(explore("llama3-8b", hardware="h100:1x8")).axes)
        4
    """
    title = f"{found.title}\n{found.best.strategy}"
    choices = [c for c in found.kinds.values() if isinstance(c, Choice)][:SHOWN]
    labels = [f"{c.kind}\n{axes_text(vars(c.strategy))}" for c in choices]
    figure = Picture(13, 8.5)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(2, 2)
    _scatter(panels[0, 0], found)
    groups = {
        name: [sum(c.candidate.terms.get(t, 0.0) for t in terms) for c in choices]
        for name, terms in GROUPS.items()
    }
    ends = [seconds_text(c.step_time) for c in choices]
    _bars(panels[0, 1], labels, groups, ends, "where the step goes", "s")
    names = list(choices[0].candidate.memory.classes())
    memory = {n: [c.candidate.memory.classes()[n] / 1e9 for c in choices] for n in names}
    ends = [f"{c.memory_bytes / 1e9:.1f} GB" for c in choices]
    _bars(panels[1, 0], labels, memory, ends, "memory of the fullest device", "GB")
    room = max(s.hardware.chip.memory for s in found.searches) / 1e9
    panels[1, 0].set_xlim(right=max(1.08 * room, panels[1, 0].get_xlim()[1]))
    panels[1, 0].axvline(room, color="#b42318", linestyle="--", linewidth=1.2)
    sent = [axis_bytes(c.candidate.job) if c.candidate.job else {} for c in choices]
    wire = {axis: [one.get(axis, 0.0) / 1e9 for one in sent] for axis in AXES}
    ends = [f"{sum(one.values()) / 1e9:.3g} GB" for one in sent]
    _bars(panels[1, 1], labels, wire, ends, "sent by one chip per step", "GB")
    return figure


def _scatter(axes: Any, found: Exploration) -> None:
    dots = thinned(found)
    for split, name in enumerate(SPLITS):
        some = [c for c in dots if split_of(c) == split]
        if some:
            x, y = [c.step_time for c in some], [c.memory_bytes / 1e9 for c in some]
            axes.scatter(x, y, s=12, color=COLOURS[split], alpha=0.6, label=name, linewidths=0)
    front = pareto(dots)
    x, y = [c.step_time for c in front], [c.memory_bytes / 1e9 for c in front]
    axes.plot(x, y, color="0.4", linewidth=1)
    best = found.best
    axes.scatter([best.step_time], [best.memory_bytes / 1e9], s=90, zorder=3, edgecolors="0.1",
                 color=COLOURS[split_of(best)])  # fmt: skip
    for room in {s.hardware.chip.memory / 1e9 for s in found.searches}:
        axes.axhline(room, color="#b42318", linestyle="--", linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step time (s)", ylabel="GB on each device")
    axes.set_title("a dot is a layout; ringed: the best", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _bars(
    axes: Any, labels: Sequence[str], parts: Mapping[str, Sequence[float]], ends: Sequence[str],
    title: str, unit: str,
) -> None:  # fmt: skip
    """Stacked horizontal bars, the first on top."""
    left = [0.0] * len(labels)
    for n, (name, sizes) in enumerate(parts.items()):
        if any(sizes):
            axes.barh(range(len(labels)), sizes, left=left, color=COLOURS[n], label=name)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    for row, (end, text) in enumerate(zip(left, ends, strict=True)):
        axes.text(end, row, f" {text}", va="center", fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
