"""The page of an exploration: one HTML text, no script, no network, no other files.

Design: everything a reader can point at is plain HTML and SVG (titles, links, radio buttons,
details), so that it works offline, in Jupyter, and where scripts are taken out.
"""

import hashlib
import html
from collections import Counter
from collections.abc import Mapping

from shardtrain.explore.bars import Row, bars, key
from shardtrain.explore.choice import Choice, axes_text, details_text, seconds_text
from shardtrain.explore.exploration import Exploration
from shardtrain.explore.gantt import gantt_key, gantt_svg, shown_schedule
from shardtrain.explore.mesh_svg import MOST_CHIPS, mesh_svg
from shardtrain.explore.ranking import MODEL_ERROR
from shardtrain.explore.scatter import SLOWEST, SPLITS, scatter_svg, split_of
from shardtrain.explore.style import COLOURS, CSS, GROUPS, TERM_WORDS
from shardtrain.planner.search import Pruned
from shardtrain.planner.traffic import format_bytes
from shardtrain.planner.wire import axis_bytes

SHOWN = 6
"""Families drawn as bars and meshes."""

MEMORY = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "runtime")
AXES = ("fsdp", "data", "tensor", "pipeline", "expert", "context")


def page(found: Exploration) -> str:
    """A whole HTML document."""
    title = html.escape(found.title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>body{{margin:0}}.stx{{min-height:100vh}}"
        ".stx>*{max-width:1240px;margin-left:auto;margin-right:auto}</style></head>"
        f"<body>{fragment(found)}</body></html>\n"
    )


def fragment(found: Exploration) -> str:
    """The same as an element for a notebook."""
    anchor = "x" + hashlib.sha256(repr(found).encode()).hexdigest()[:8]
    named = {name: c for name, c in found.kinds.items() if isinstance(c, Choice)}
    choices = dict(list(named.items())[:SHOWN])
    parts = [f"<style>{CSS}{_tab_css(anchor, len(choices))}</style>", _head(found)]
    if found.ranked:
        parts.append('<div class="grid">')
        parts += [_scatter(found, anchor), _time(choices), _memory(choices)]
        parts += [_communication(choices), _layouts(choices, anchor)]
        parts.append("</div>")
    parts += [_table(found, anchor), _lost(found), _assumptions(found)]
    return f'<div class="stx">{"".join(parts)}</div>'


def _card(title: str, body: str, wide: bool = False) -> str:
    return f'<div class="card{" wide" if wide else ""}"><h2>{title}</h2>{body}</div>'


def _head(found: Exploration) -> str:
    title = f"<h1>{html.escape(found.title)}</h1>"
    if not found.ranked:
        return f"<div>{title}<p><b>Nothing fits.</b> {html.escape(found.advice)}</p></div>"
    best, chip = found.best, found.best.hardware.chip
    fields = vars(best.strategy)
    unit = "tokens/s" if found.subject.sequence > 1 else "examples/s"
    cost = f"${best.cost:,.3g}" if found.currency == "$" else f"{best.cost:,.0f}"
    facts = [
        ("per step", seconds_text(best.step_time)),
        (unit, f"{best.tokens_per_second:,.0f}"),
        ("MFU", f"{best.mfu:.1%}"),
        (f"of {chip.memory / 1e9:g} GB on each device", f"{best.memory_bytes / 1e9:.1f}"),
        ("per step" if found.currency == "$" else "chip-seconds per step", cost),
    ]
    shown = "".join(f"<div><b>{value}</b><span class='soft'>{name}</span></div>"
                    for name, value in facts)  # fmt: skip
    ties = len(found.ties) - 1
    others = "1 other layout is" if ties == 1 else f"{ties:,} other layouts are"
    tie = f"{others} within {MODEL_ERROR:.0%}, the error between layouts: a tie."
    return (
        f"<div>{title}<p>Best by {found.rank}: <b>{html.escape(best.kind)}</b>, "
        f"{axes_text(fields)}; {details_text(fields)}</p><p><code>{best.strategy}</code></p>"
        f'<div class="facts">{shown}</div><p class="soft">{tie if ties else ""} '
        f"{len(found.ranked):,} layouts fit, {len(found.pruned):,} do not.</p></div>"
    )


def _scatter(found: Exploration, anchor: str) -> str:
    used = {split_of(c) for c in found.ranked}
    entries = [(COLOURS[n], name) for n, name in enumerate(SPLITS) if n in used]
    note = (
        '<p class="soft">A dot is a layout; large dots are the best of their family, the line '
        "joins those that none beats in both, dashed is what a device has. "
        f"Layouts over {SLOWEST:g} times as slow are not drawn.</p>"
    )
    return _card("Time and memory", scatter_svg(found, anchor) + key(entries) + note)


def _label(name: str, choice: Choice) -> str:
    return f"{name} ({axes_text(vars(choice.strategy))})"


def _memory(choices: Mapping[str, Choice]) -> str:
    rows: list[Row] = [
        (_label(name, c), c.candidate.memory.classes(), f"{c.memory_bytes / 1e9:.1f} GB")
        for name, c in choices.items()
    ]
    limits = [c.hardware.chip.memory for c in choices.values()]
    return _card("Memory of the fullest device", bars(rows, MEMORY, "B", limits))


def _time(choices: Mapping[str, Choice]) -> str:
    rows: list[Row] = []
    for kind, c in choices.items():
        sizes = {
            name: sum(c.candidate.terms.get(term, 0.0) for term in terms)
            for name, terms in GROUPS.items()
        }
        rows.append((_label(kind, c), sizes, seconds_text(c.step_time)))
    words = "".join(f"<li><b>{k}</b>: {v}</li>" for k, v in TERM_WORDS.items())
    terms = f"<details><summary>terms</summary><ul>{words}</ul></details>"
    return _card("Where the step goes", bars(rows, tuple(GROUPS), "s") + terms)


def _communication(choices: Mapping[str, Choice]) -> str:
    rows: list[Row] = []
    for kind, c in choices.items():
        if c.candidate.job is None:
            continue
        sizes = axis_bytes(c.candidate.job)
        seen = sum(c.candidate.terms.get(axis, 0.0) for axis in AXES)
        end = f"{format_bytes(sum(sizes.values()))}, {seconds_text(seen)} not hidden"
        rows.append((_label(kind, c), sizes, end))
    return _card("Sent by one chip per step, by mesh axis", bars(rows, AXES, "B"))


def _layouts(choices: Mapping[str, Choice], anchor: str) -> str:
    """Tabs: the mesh and the pipeline of each family's best layout."""
    parts = ['<div class="tabs">']
    for n, name in enumerate(choices):
        checked = " checked" if n == 0 else ""
        parts.append(
            f'<input type="radio" name="{anchor}t" id="{anchor}t{n}"{checked}>'
            f'<label for="{anchor}t{n}">{html.escape(name)}</label>'
        )
    parts += [f'<section class="{anchor}s{n}">{_layout(c)}</section>'
              for n, c in enumerate(choices.values())]  # fmt: skip
    return _card("Who holds what", "".join(parts) + "</div>", wide=True)


def _layout(choice: Choice) -> str:
    some = f", the first {MOST_CHIPS}" if choice.hardware.chip_count > MOST_CHIPS else ""
    text = (
        f'<p class="soft">{axes_text(vars(choice.strategy))} on {choice.hardware}{some}. A square '
        "is a chip, a block a host. The number is the part of the batch it reads; hue is the "
        f"pipeline stage, shade the tensor slice{_mark(choice)}. Point at one for what it "
        "holds.</p>"
    )
    drawn = f'<div class="scroll">{mesh_svg(choice)}</div>'
    schedule = shown_schedule(choice)
    if schedule is None:
        return text + drawn
    s = choice.strategy
    some = ""
    if schedule.num_microbatches < s.num_microbatches:
        some = f", drawn with {schedule.num_microbatches} of {s.num_microbatches} microbatches"
    bubble = choice.candidate.terms.get("bubble", 0.0) / choice.step_time
    note = f'<p class="soft">{schedule.name}{some}; the bubble is {bubble:.1%} of the step.</p>'
    gantt = f'<div class="scroll">{gantt_svg(schedule)}</div>'
    return text + drawn + note + gantt + key(gantt_key(schedule))


def _mark(choice: Choice) -> str:
    """What the dark mark in a square means."""
    level = choice.strategy.zero
    if choice.strategy.fsdp == 1 or level == 0:
        return ""
    what = ("optimizer state", "gradients and optimizer state",
            "parameters, gradients and optimizer state")[level - 1]  # fmt: skip
    return f"; the dark mark is its slice, over fsdp, of {what}"


def _tab_css(anchor: str, count: int) -> str:
    return "".join(
        f"#{anchor}t{n}:checked~.{anchor}s{n}{{display:block!important}}" for n in range(count)
    )


def _table(found: Exploration, anchor: str) -> str:
    unit = "$" if found.currency == "$" else "chip-s"
    heads = ("", "strategy", "layout", "step", "MFU", "GB", unit, "why")
    head = "".join(f"<th>{h}</th>" for h in heads)
    numbers = {kind: n for n, kind in enumerate(found.kinds)}
    rows = []
    for mark, kind, one in found.shown(24):
        row = f'id="{anchor}{numbers[kind]}"'
        fields = one.strategy if isinstance(one, Pruned) else vars(one.strategy)
        layout = f"{axes_text(fields)}; {details_text(fields)}"
        if isinstance(one, Pruned):
            numbers_ = '<td colspan="4"></td>'
            why, css = one.reason, "lost"
        else:
            values = (seconds_text(one.step_time), f"{one.mfu:.1%}",
                      f"{one.memory_bytes / 1e9:.1f}", f"{one.cost:,.3g}")  # fmt: skip
            numbers_ = "".join(f'<td class="num">{v}</td>' for v in values)
            why, css = found.reason(one), "best" if mark == "*" else ""
        rows.append(
            f'<tr {row} class="{css}"><td>{mark}</td><td>{html.escape(kind)}</td>'
            f"<td>{html.escape(layout)}</td>{numbers_}"
            f'<td class="why">{html.escape(why)}</td></tr>'
        )
    note = f"* best, ≈ tie within {MODEL_ERROR:.0%}, - does not run"
    body = f'<div class="scroll"><table class="families"><thead><tr>{head}</tr></thead><tbody>'
    body += "".join(rows) + f'</tbody></table></div><p class="soft">{note}</p>'
    return _card("The best of each family, and why the others lost", body, wide=True)


def _lost(found: Exploration) -> str:
    """Why layouts were left out, counted."""
    counts: Counter[str] = Counter()
    for one in found.pruned:
        counts["does not fit the device's memory" if one.shortfall else one.reason] += 1
    rows = "".join(f'<tr><td class="num">{n:,}</td><td>{html.escape(why)}</td></tr>'
                   for why, n in counts.most_common(12))  # fmt: skip
    if not rows:
        return ""
    return (
        f"<details><summary>{len(found.pruned):,} layouts cannot run</summary>"
        f'<div class="scroll"><table><tbody>{rows}</tbody></table></div></details>'
    )


def _assumptions(found: Exploration) -> str:
    parts = [f"<p>{html.escape(note)}</p>" for note in found.subject.notes]
    for search in found.searches:
        rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>"
                       for a, b in search.hardware.rows())  # fmt: skip
        parts.append(f"<p><b>{search.hardware}</b></p><table><tbody>{rows}</tbody></table>")
    return (
        "<details><summary>what this assumes</summary>"
        "<p>An analytic model of memory and time, calibrated on published runs; nothing was "
        f"measured or compiled here.</p>{''.join(parts)}</details>"
    )
