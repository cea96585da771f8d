"""Tables and picture of `gpu.py`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

COLORS = {"shardtrain": "#2563eb", "hand-written": "#94a3b8", "PyTorch": "#f97316"}


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per case and program that ran."""
    found = []
    for key, record in results["jobs"].items():
        if "left_out" in record:
            continue
        programs = record.get("programs", {"PyTorch": record})
        for name, row in programs.items():
            kept = {k: record.get(k) for k in ("planned_bytes", "estimated_step_s")}
            found.append({**row, **kept, "case": key.removesuffix(" torch"), "program": name})
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: what was measured, then what was left out and why."""
    gib = lambda b: f"{b / 2**30:.1f}" if b else ""
    lines = [
        "| case | program | tokens/s | MFU | step ms | estimated | gap ms | peak GiB | planned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows(results):
        ours = r["program"] == "shardtrain"
        cells = [
            r["case"], r["program"], f"{r['tokens_per_s']:,.0f}",
            f"{r['mfu']:.1%}" if r["mfu"] else "",
            f"{1e3 * r['step_s']:.1f}",
            f"{1e3 * r['estimated_step_s']:.1f}" if ours else "",
            f"{r['gap_ms']:.2f}" if "gap_ms" in r else "",
            gib(r["peak_bytes"]),
            gib(r["planned_bytes"]) if ours else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    for key, record in results["jobs"].items():
        if "left_out" in record:
            lines.append(f"\n{key}: {record['left_out']}")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of MFU (tokens per second where the chip's peak is not known) by case and program."""
    found = rows(results)
    cases = list(dict.fromkeys(r["case"] for r in found))
    figure = Figure(figsize=(max(6.0, 1.6 * len(cases)), 3.6), layout="constrained")
    axes = figure.subplots()
    known = any(r["mfu"] for r in found)
    for n, (name, color) in enumerate(COLORS.items()):
        value = {r["case"]: (r["mfu"] or 0) * 100 if known else r["tokens_per_s"] for r in found
                 if r["program"] == name}  # fmt: skip
        at = [cases.index(c) + 0.27 * (n - 1) for c in value]
        bars = axes.bar(at, list(value.values()), 0.25, color=color, label=name)
        axes.bar_label(bars, fmt="%.1f" if known else "%.0f", fontsize=7)
    if known:
        axes.axhline(52, color="#16a34a", lw=1, ls="--", label="goal")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("causal MFU, %" if known else "tokens per second")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
