"""The table and the picture of `peers.py`, from its JSON.

python benchmarks/peers_report.py benchmarks/results/peers.json
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOC = HERE.parent / "docs/performance.md"
PICTURE = HERE.parent / "docs/images/peers.png"
BEGIN, END = "<!-- peers: from benchmarks/results/peers.json -->", "<!-- /peers -->"


def _ratio(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return ""
    low, high = row["ratio_quartiles"]
    return f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"


def table(found: dict[str, Any]) -> str:
    """Markdown: one row per program, then what could not run."""
    lines = [
        "| program | tokens/s | shardtrain is faster by (quartiles) | peak memory, MiB "
        "| start to first step, s | lines |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:,.0f} | {_ratio(row)} "
            f"| {row['peak_bytes'] / 2**20:,.0f} | {row['seconds_to_first_step']:.1f} "
            f"| {row['lines']} |"
        )
    lines += ["", _setting(found)]
    lines += [f"{sentence.rstrip('.')}." for sentence in found["absent"].values()]
    return "\n".join(lines)


def _setting(found: dict[str, Any]) -> str:
    versions: dict[str, set[str]] = {}
    for row in found["rows"]:
        for name, version in row["versions"].items():
            versions.setdefault(name, set()).add(version)
    named = ", ".join(f"{n} {' and '.join(sorted(v))}" for n, v in sorted(versions.items()))
    return (
        f"{found['date']}, {found['cores']} cores of an {found['chip']} (load average "
        f"{found['load_at_start']:.1f} before the start), {named}; "
        f"{found['rows'][0]['parameters']:,} parameters, {found['batch']} x {found['sequence']} "
        f"tokens per step, float32, AdamW; median of {found['rounds']} rounds of "
        f"{found['steps_per_turn']} steps."
    )


def put_table(found: dict[str, Any], page: Path) -> None:
    """Replace the table between the markers of a page."""
    text = page.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}{BEGIN}\n{table(found)}\n{after}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Bars of the ratios, and of the seconds to the first step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.32 * len(found["rows"]) + 1.6), layout="constrained")
    speed, start = figure.subplots(1, 2)
    peers = [row for row in found["rows"] if "ratio" in row][::-1]
    spread = [
        [row["ratio"] - row["ratio_quartiles"][0] for row in peers],
        [row["ratio_quartiles"][1] - row["ratio"] for row in peers],
    ]
    names = [row["name"] for row in peers]
    speed.barh(names, [row["ratio"] for row in peers], xerr=spread, color="#4c72b0")
    speed.axvline(1.0, color="black", linewidth=1)
    speed.set_xlabel("shardtrain's tokens/s over the peer's (bar: median, line: quartiles)")
    rows = found["rows"][::-1]
    ours = ["#dd8452" if row["against"] is None else "#8c8c8c" for row in rows]
    start.barh([r["name"] for r in rows], [r["seconds_to_first_step"] for r in rows], color=ours)
    start.set_xlabel("seconds from process start to the first finished step")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Rewrite the page and the picture from a result file."""
    found = json.loads(Path(sys.argv[1]).read_text())
    put_table(found, DOC)
    draw(found, PICTURE)


if __name__ == "__main__":
    main()
