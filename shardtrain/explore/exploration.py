"""What `st.explore` found: ranked layouts, reasons, tables, pictures."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardtrain.errors import StrategyError
from shardtrain.explore.choice import Choice, axes_text, details_text, seconds_text
from shardtrain.explore.compiled import CompiledChoice, compile_choices
from shardtrain.explore.ranking import MODEL_ERROR, RANKS, families, why
from shardtrain.explore.subject import Subject
from shardtrain.plan import Plan
from shardtrain.planner.search import Layouts, Pruned
from shardtrain.strategy import Strategy
from shardtrain.tables import Table

if TYPE_CHECKING:
    from shardtrain.viz.figure import Picture


@dataclass(frozen=True)
class Exploration:
    """Every layout that was looked at, best first, and why the others lost.

    Renders as a table in terminals and as a page with figures in Jupyter.

    Attributes:
        subject: what is trained.
        searches: what was found on each hardware.
        ranked: layouts that fit, best first.
        rank: what "best" means: "time", "memory" or "cost".
        currency: unit of `Choice.cost`: "$" or "chip-s".
        rejected: layouts that the estimate liked and `st.plan` refused, with its reason.
        seconds: how long the search took.
        compiled: what the real compiler said of the first few, if asked.
    """

    subject: Subject
    searches: tuple[Layouts, ...]
    ranked: tuple[Choice, ...]
    rank: str
    currency: str
    rejected: tuple[Pruned, ...] = ()
    seconds: float = 0.0
    compiled: tuple[CompiledChoice, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        where = ", ".join(str(s.hardware) for s in self.searches)
        found = f"{len(self.ranked)} layouts fit, {len(self.pruned)} do not"
        best = f", best {self.ranked[0].strategy}" if self.ranked else ""
        return f"Exploration({self.subject.model.name} on {where}: {found}{best})"

    @property
    def best(self) -> Choice:
        """The best layout that fits.

        Raises:
            StrategyError: nothing fits; the message has the cheapest change.
        """
        if not self.ranked:
            raise StrategyError(f"no layout fits: {self.advice}")
        return self.ranked[0]

    @property
    def advice(self) -> str:
        """The cheapest change that makes something fit; "" when something does."""
        return "" if self.ranked else "; ".join(s.advice for s in self.searches)

    @property
    def pruned(self) -> tuple[Pruned, ...]:
        """Layouts that cannot run, each with its reason."""
        return self.rejected + tuple(p for s in self.searches for p in s.pruned)

    @property
    def ties(self) -> tuple[Choice, ...]:
        """Layouts that the model's error cannot tell from the best, in what is ranked."""
        value = lambda one: RANKS[self.rank](one)[0]
        limit = value(self.best) * (1 + MODEL_ERROR)
        return tuple(one for one in self.ranked if value(one) <= limit)

    @cached_property
    def kinds(self) -> dict[str, Choice | Pruned]:
        """Family ("FSDP + tensor") -> its best layout, or the nearest of those that do not fit.

        Families that fit come first, best first; on several machines "h100:8x8: FSDP + tensor",
        the best of each machine before the others.
        """
        return families(self.ranked, self.searches, self.rejected, self.rank)

    def why(self, strategy: Strategy | str) -> str:
        """Why a layout won, lost, or cannot run.

        Args:
            strategy: only the fields given are compared: "tensor=8" is the best layout with it.

        Raises:
            StrategyError: no layout that was looked at has these values.

        Example:
            >>> import shardtrain as st
            >>> st.explore("llama3-8b", hardware="h100:1x8", global_batch=64).why("tensor=8,data=1")
            '...% slower: ...'
        """
        return why(str(strategy), self.ranked, self.pruned)

    def table(self, rows: int = 12, compact: bool = False) -> Table:
        """The best layout of each family, with the reason it won, lost or cannot run.

        Args:
            rows: families shown, a third of them kept for those that cannot run.
            compact: fewer columns, for narrow terminals.
        """
        lines = []
        for mark, kind, one in self.shown(rows):
            if isinstance(one, Choice):
                lines.append((mark, kind, *_cells(one), self.reason(one)))
            else:
                layout = f"{axes_text(one.strategy)}; {details_text(one.strategy)}"
                lines.append((mark, kind, layout, "", "", "", "", one.reason))
        cost = ">$/step" if self.currency == "$" else ">chip-s/step"
        columns = ("", "strategy", "layout", ">step", ">MFU", ">GB", cost, "why")
        if compact:
            keep = (0, 2, 3, 5, 7)
            columns = tuple(columns[n] for n in keep)
            named = [(*line[:2], f"{line[1]}: {line[2]}", *line[3:]) for line in lines]
            lines = [tuple(line[n] for n in keep) for line in named]
        return Table(self.title, columns, tuple(lines), self.notes(rows))

    def reason(self, one: Choice) -> str:
        """Why a layout won or lost, in a few words."""
        text = one.reason
        text = text if text.startswith("fastest") else text.partition(" (")[0]
        if len(self.searches) == 1 or one is self.ranked[0]:
            return text
        what = {"time": "time", "memory": "memory", "cost": "cost"}[self.rank]
        more = RANKS[self.rank](one)[0] / RANKS[self.rank](self.best)[0] - 1
        return f"{more:+.1%} {what}; on {one.hardware} {text}"

    def shown(self, rows: int = 12) -> list[tuple[str, str, Choice | Pruned]]:
        """(mark, family, its best layout): those that fit, best first, then those that do not."""
        fit = [(kind, one) for kind, one in self.kinds.items() if isinstance(one, Choice)]
        lost = [(kind, one) for kind, one in self.kinds.items() if isinstance(one, Pruned)]
        lost.sort(key=lambda pair: len(pair[0]) if fit else pair[1].shortfall or math.inf)
        fit = fit[: max(rows - len(lost), rows - rows // 3)]
        ties = {id(one) for one in self.ties} if self.ranked else set()
        mark = lambda one: "*" if one is self.ranked[0] else "≈" if id(one) in ties else ""
        told: list[tuple[str, str, Choice | Pruned]] = [(mark(o), k, o) for k, o in fit]
        return told + [("-", kind, one) for kind, one in lost[: rows - len(fit)]]

    @property
    def title(self) -> str:
        """Model, batch and hardware."""
        where = ", ".join(str(s.hardware) for s in self.searches)
        s = self.subject
        return f"{s.model.name}, {s.global_batch} x {s.sequence} tokens per step, on {where}"

    def notes(self, rows: int = 12) -> tuple[str, ...]:
        """Sentences below the table."""
        found = []
        if self.ranked:
            ties = len(self.ties)
            found.append(
                f"* best by {self.rank}; ≈ tie: within {MODEL_ERROR:.0%}, the error between "
                f"layouts ({ties} of {len(self.ranked)} layouts); - does not run"
            )
            found.append(f"strategy: {self.best.strategy}")
        else:
            found.append(f"nothing fits: {self.advice}")
        more = len(self.kinds) - rows
        if more > 0:
            found.append(f"{more} more families of layouts: .kinds")
        found.append(
            f"{len(self.ranked)} layouts fit, {len(self.pruned)} do not; {self.seconds:.1f} s"
        )
        return (*found, *self.subject.notes)

    def plan(self, choice: Choice | None = None) -> Plan:
        """`st.plan` of the user's model under a layout, for its hardware.

        Args:
            choice: One of `ranked`; None: the best.

        Raises:
            StrategyError: the exploration is of a catalogue model.
        """
        chosen = choice or self.best
        if self.subject.plan is None:
            raise StrategyError("a catalogue model has no code to plan; explore your own module")
        return self.subject.plan(chosen.strategy, str(chosen.hardware))

    def compile(self, top: int = 3) -> "tuple[CompiledChoice, ...]":
        """Compile the best layouts with the real compiler of the hardware (see `Plan.compile`).

        Args:
            top: how many.

        Raises:
            StrategyError: the exploration is of a catalogue model.
        """
        return compile_choices(self.ranked[:top], self.plan)

    def plot(self, path: str | Path | None = None) -> "Picture":
        """Time against memory, memory by class, time by term, bytes by axis, in one figure.

        Args:
            path: also write it there (png, svg, pdf).
        """
        from shardtrain.explore.figure import exploration_figure  # here: matplotlib is slow

        figure = exploration_figure(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page: no network, no other files, light and dark.

        Args:
            path: also write it there.
        """
        from shardtrain.explore.page import page  # here: it imports this module's types

        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_json(self, path: str | Path | None = None, top: int = 100) -> str:
        """The ranked layouts, the families and the reasons, as JSON.

        Args:
            path: also write it there.
            top: ranked layouts written.
        """
        kinds = {
            kind: one.to_dict() if isinstance(one, Choice)
            else {"strategy": dict(one.strategy), "reason": one.reason}
            for kind, one in self.kinds.items()
        }  # fmt: skip
        found = {
            "model": self.subject.model.name,
            "global_batch": self.subject.global_batch,
            "sequence": self.subject.sequence,
            "hardware": [str(s.hardware) for s in self.searches],
            "rank": self.rank,
            "currency": self.currency,
            "ranked": [one.to_dict() for one in self.ranked[:top]],
            "kinds": kinds,
            "advice": self.advice,
            "ties": len(self.ties) if self.ranked else 0,
            "notes": list(self.subject.notes),
        }
        text = json.dumps(found, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        from shardtrain.explore.page import fragment  # here: it imports this module's types

        return fragment(self)


def _cells(one: Choice) -> tuple[str, ...]:
    fields = vars(one.strategy)
    layout = f"{axes_text(fields)}; {details_text(fields)}"
    return layout, seconds_text(one.step_time), f"{one.mfu:.1%}", \
        f"{one.memory_bytes / 1e9:.1f}", f"{one.cost:,.3g}"  # fmt: skip
