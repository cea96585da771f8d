"""The table and the picture of `peers.py`, from its JSON.

python benchmarks/peers_report.py benchmarks/results/peers.json
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOC = HERE.parent / "docs/performance.md"
PICTURE = HERE.parent / "docs/images/peers.png"
RESULTS = HERE / "results"


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
        f"{_machine(found)}, {named}; "
        f"{found['rows'][0]['parameters']:,} parameters, {found['batch']} x {found['sequence']} "
        f"tokens per step, float32, AdamW; median of {found['rounds']} rounds of "
        f"{found['steps_per_turn']} steps."
    )


def input_table(found: dict[str, Any]) -> str:
    """Markdown of `input_pipeline.py`: the wait for data by kind of source."""
    lines = ["| source | wait per step, ms | share of the run | run longer than its steps |"]
    lines.append("|---|---|---|---|")
    for name, row in found["sources"].items():
        lines.append(
            f"| {name} | {row['data_wait_ms']:.2f} | {row['data_wait_share']:.2%} "
            f"| {row['longer_than_steps']:.2%} |"
        )
    lines += ["", f"{_machine(found)}, steps of {1e3 * found['step_seconds']:.0f} ms."]
    return "\n".join(lines)


def startup_table(found: dict[str, Any]) -> str:
    """Markdown of `startup.py`: seconds by phase, without and with programs on disk."""
    cold, warm = found["nothing on disk"], found["compiled programs on disk"]
    lines = [
        "| phase | CPU s (wall), nothing on disk | compiled programs on disk |",
        "|---|---|---|",
    ]
    cell = lambda phase: f"{phase['cpu_seconds']:.2f} ({phase['seconds']:.2f})"
    lines += [f"| {name} | {cell(cold[name])} | {cell(warm[name])} |" for name in cold]
    lines += ["", "| command | seconds |", "|---|---|"]
    lines += [f"| `{name}` | {seconds:.2f} |" for name, seconds in found["commands"].items()]
    return "\n".join([*lines, "", f"{_machine(found)}."])


def _machine(found: dict[str, Any]) -> str:
    return (
        f"{found['date']}, {found['cores']} cores of an {found['chip']} (load average "
        f"{found['load_at_start']:.1f} before the start)"
    )


TABLES = {"peers": table, "input_pipeline": input_table, "startup": startup_table}
"""Result file -> what the page shows of it."""


def put_table(name: str, found: dict[str, Any], page: Path) -> None:
    """Replace the table between the markers of a page."""
    begin, end = f"<!-- from benchmarks/results/{name}.json -->", f"<!-- /{name} -->"
    text = page.read_text()
    before, after = text[: text.index(begin)], text[text.index(end) :]
    page.write_text(f"{before}{begin}\n{TABLES[name](found)}\n{after}")


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
    speed.set_xlabel("tokens/s over the peer's: median, quartiles")
    rows = found["rows"][::-1]
    ours = ["#dd8452" if row["against"] is None else "#8c8c8c" for row in rows]
    start.barh([r["name"] for r in rows], [r["seconds_to_first_step"] for r in rows], color=ours)
    start.set_xlabel("seconds to the first finished step")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Rewrite the page and the picture."""
    for name in TABLES:
        found = json.loads((RESULTS / f"{name}.json").read_text())
        put_table(name, found, DOC)
        if name == "peers":
            draw(found, PICTURE)


if __name__ == "__main__":
    main()
