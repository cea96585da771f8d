"""Putting layouts in order, in families, and finding why one lost."""

from collections.abc import Callable, Sequence

from shardtrain.errors import StrategyError
from shardtrain.explore.choice import Choice, kind_of, nearest_of
from shardtrain.planner.search import Layouts, Pruned
from shardtrain.strategy import Strategy

MODEL_ERROR = 0.05
"""Layouts of one model on one machine whose times differ by less are ties: most errors of the time
model are shared between them, what is left is about this much."""

RANKS: dict[str, Callable[[Choice], tuple[float, ...]]] = {
    "time": lambda one: (one.step_time, one.memory_bytes),
    "memory": lambda one: (one.memory_bytes, one.step_time),
    "cost": lambda one: (one.cost, one.step_time),
}


def rank_choices(choices: Sequence[Choice], rank: str) -> tuple[Choice, ...]:
    """Best first by "time", "memory" or "cost"."""
    return tuple(sorted(choices, key=RANKS[rank]))


def families(
    ranked: Sequence[Choice], searches: Sequence[Layouts], rejected: Sequence[Pruned], rank: str
) -> dict[str, Choice | Pruned]:
    """Family -> its best layout, or the nearest of those that do not fit.

    Args:
        ranked: layouts that fit, best first.
        searches: what was found on each machine; several: names start with the machine, and the
            best of each machine come first.
        rejected: layouts that `st.plan` refused.
        rank: what "best" means.
    """
    several = len(searches) > 1
    name = lambda machine, kind: f"{machine}: {kind}" if several else kind
    found: dict[str, Choice | Pruned] = {}
    if several:
        leaders = {str(one.hardware): one for one in reversed(ranked)}
        for one in rank_choices(list(leaders.values()), rank):
            found[name(one.hardware, one.kind)] = one
    for one in ranked:
        found.setdefault(name(one.hardware, one.kind), one)
    lost: dict[str, list[Pruned]] = {}
    for search in searches:
        for one in search.pruned:
            lost.setdefault(name(search.hardware, kind_of(one.strategy)), []).append(one)
    for one in rejected if not several else ():
        lost.setdefault(kind_of(one.strategy), []).append(one)
    for kind, group in lost.items():
        found.setdefault(kind, nearest_of(group))
    return found


def why(text: str, ranked: Sequence[Choice], pruned: Sequence[Pruned]) -> str:
    """Why the best layout with some values won, lost, or cannot run.

    Args:
        text: fields of a strategy; only those named are compared.
        ranked: layouts that fit, best first.
        pruned: those that cannot run.

    Raises:
        StrategyError: no layout that was looked at has these values.
    """
    asked = Strategy.parse(text)
    names = [part.partition("=")[0].strip() for part in text.split(",") if part]
    wanted = {name: getattr(asked, name) for name in names}
    for one in ranked:
        if all(getattr(one.strategy, name) == value for name, value in wanted.items()):
            return one.reason
    usual = Strategy()
    has = lambda one, name: one.strategy.get(name, getattr(usual, name))
    lost = [p for p in pruned if all(has(p, name) == value for name, value in wanted.items())]
    if lost:
        return nearest_of(lost).reason
    raise StrategyError(f"no layout with {text} was looked at; limit the search to it by name")
