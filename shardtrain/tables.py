"""One table type: rich in terminals, HTML in notebooks, plain text in logs."""

import html
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Columns and rows of text.

    Args:
      title: Shown above.
      columns: Headings; one that starts with ">" is right-aligned.
      rows: One tuple of strings per row.
      notes: Sentences shown below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __rich__(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", caption_justify="left")
        for name in self.columns:
            right = name.startswith(">")
            table.add_column(
                name.lstrip(">"), justify="right" if right else "left", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*(escape(cell) for cell in row))
        if self.notes:
            table.caption = escape("\n".join(self.notes))
        return table

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, highlight=False, force_terminal=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    def _repr_html_(self) -> str:
        cell = "padding:2px 8px;vertical-align:top;text-align:"
        side = ["right" if c.startswith(">") else "left" for c in self.columns]
        head = "".join(
            f'<th style="{cell}{s}">{html.escape(c.lstrip(">"))}</th>'
            for c, s in zip(self.columns, side, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="{cell}{s}">{html.escape(v)}</td>'
                for v, s in zip(row, side, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<p>{html.escape(n)}</p>" for n in self.notes)
        return (
            f"<div><b>{html.escape(self.title)}</b><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{notes}</div>"
        )


def escape(text: str) -> str:
    """Keep rich from reading brackets as markup."""
    return text.replace("[", "\\[")


def bytes_text(count: float) -> str:
    """`1536 -> "1.5 KiB"`: binary units, as memory is sold and measured."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
