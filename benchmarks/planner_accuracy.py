"""How far the analytic planner is from published runs, by source, on runs it has not seen.

    python benchmarks/planner_accuracy.py            # error tables, JSON, PNG (about a minute)
    python benchmarks/planner_accuracy.py --refit    # rates and widths refitted in every fold too,
                                                     # publications in five folds (ten minutes)
    python benchmarks/planner_accuracy.py --fit      # fit anew, write data/calibration.json

Two questions are asked. "Ten folds" and "halves": a random tenth or half of all runs is held out,
so most held-out runs have relatives (same software and chip) among the rest; this is the error on
one more run of a known stack. "Source left out": all runs of one publication are held out; this is
the error on a stack and a cluster never seen.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from shardtrain.planner.calibration import (
    calibration,
    constants,
    measured_bytes,
    measured_seconds,
    memory_calibration,
    solve,
)
from shardtrain.planner.calibration_fit import fit_memory, fit_time, physics, rounded
from shardtrain.planner.memory import job_memory
from shardtrain.planner.points import Point, load_points, read_point

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "shardtrain/planner/data/calibration.json"
RESULTS = ROOT / "benchmarks/results/planner_accuracy.json"
PICTURE = ROOT / "docs/images/planner_accuracy.png"

KINDS = ("physics", "tenths", "halves", "unseen")

SOURCES = (
    ("performance-summary", "NVIDIA Megatron-Bridge"), ("llm-foundry", "MosaicML llm-foundry"),
    ("bigscience", "BigScience tr11-176B"), ("maxtext", "MaxText configs and docs"),
    ("tpu-recipes", "Google tpu-recipes"), ("gpu-recipes", "Google gpu-recipes"),
    ("JAX-Toolbox", "NVIDIA JAX-Toolbox"), ("torchtitan", "torchtitan"), ("NeMo", "NVIDIA NeMo"),
    ("2104.04473", "Megatron PTD-P"), ("2205.05198", "Korthikanti et al."),
    ("2402.15627", "MegaScale"), ("2507.05411", "AXLearn"), ("pytorch.org", "PyTorch FSDP blogs"),
    ("ml-engineering", "ml-engineering"), ("karpathy", "llm.c"), ("Megatron-LM", "Megatron-LM"),
    ("alpa", "Alpa"), ("2407.21783", "Llama 3 paper"),
)  # fmt: skip


def publication(point: Point) -> str:
    """The publication a run comes from (many files and tables of one project are one)."""
    return next((name for word, name in SOURCES if word in point.source), point.source[:40])


def correct(
    entry: dict[str, Any], points: Sequence[Point], residual: np.ndarray, train: np.ndarray,
    test: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Log error of held-out runs when only `train` calibrates."""
    known = solve([points[i] for i in train], residual[train], entry)
    fixes = [known.correct(points[i]) for i in test]
    return np.array([f.constant + f.similarity for f in fixes]) - residual[test]


def fold(
    points: Sequence[Point], measured: np.ndarray, train: np.ndarray, test: np.ndarray,
    stored: dict[str, Any], refit: bool,
) -> np.ndarray:  # fmt: skip
    """Log(predicted / measured) step time of held-out runs."""
    rates, entry = constants(), stored["time"]
    if refit:
        rates, entry = fit_time([points[i] for i in train], measured[train], rounds=1)
    else:
        known = {points[i].id for i in train}
        factor = {key: f for key, f in entry["noise_factor"].items() if key in known}
        entry = {**entry, "noise_factor": factor}
    return correct(entry, points, measured - physics(points, rates), train, test)


def validate(
    points: Sequence[Point], measured: np.ndarray, stored: dict[str, Any], refit: bool
) -> dict[str, np.ndarray]:
    """Log errors of every run under both ways of holding out."""
    count = len(points)
    everything = np.arange(count)
    rng = np.random.default_rng(0)
    halves = np.zeros((1 if refit else 4, count))
    for row in halves:
        order = rng.permutation(count)
        for test in (order[: count // 2], order[count // 2 :]):
            train = np.setdiff1d(everything, test)
            row[test] = fold(points, measured, train, test, stored, refit)
    tenths = np.zeros(count)
    order = rng.permutation(count)
    for start in range(10):
        test = order[start::10]
        train = np.setdiff1d(everything, test)
        tenths[test] = fold(points, measured, train, test, stored, refit)
    names = np.array([publication(p) for p in points])
    unseen = np.zeros(count)
    for group in publication_folds(names, refit):
        held = np.isin(names, group)
        test, train = np.where(held)[0], np.where(~held)[0]
        unseen[test] = fold(points, measured, train, test, stored, refit)
    plain = physics(points, constants()) - measured
    return {
        "physics": plain, "tenths": tenths, "halves": halves, "unseen": unseen, "names": names,
    }  # fmt: skip


def publication_folds(names: np.ndarray, few: bool) -> list[list[str]]:
    """Publications to hold out together: each alone, or five folds of about equal size."""
    order = sorted(set(names.tolist()), key=lambda name: -(names == name).sum())
    if not few:
        return [[name] for name in order]
    folds: list[list[str]] = [[] for _ in range(5)]
    for name in order:
        min(folds, key=lambda fold: np.isin(names, fold).sum()).append(name)
    return folds


def percent(log_error: np.ndarray) -> tuple[float, float]:
    """(median, 90th percentile) of |predicted / measured - 1|, in percent."""
    relative = 100 * np.abs(np.expm1(log_error.ravel()))
    return float(np.median(relative)), float(np.quantile(relative, 0.9))


def summarise(errors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row per publication, and one for all."""
    names = errors["names"]
    rows = []
    for name in ["all", *sorted(set(names), key=lambda n: -(names == n).sum())]:
        chosen = np.ones(len(names), bool) if name == "all" else names == name
        row: dict[str, Any] = {"source": name, "runs": int(chosen.sum())}
        for kind in KINDS:
            middle, tail = percent(errors[kind][..., chosen])
            row[f"{kind}_median"], row[f"{kind}_p90"] = round(middle, 1), round(tail, 1)
        rows.append(row)
    return rows


def memory_errors(stored: dict[str, Any]) -> dict[str, Any]:
    """Held-out memory error: every run with printed memory, ten folds."""
    pairs = [(read_point(r), measured_bytes(r)) for r in load_points()]
    points = [p for p, size in pairs if size]
    plain = np.array([math.log(size / job_memory(p.job).total) for p, size in pairs if size])
    everything = np.arange(len(points))
    order = np.random.default_rng(0).permutation(len(points))
    error = np.zeros(len(points))
    for k in range(10):
        test = order[k::10]
        train = np.setdiff1d(everything, test)
        error[test] = correct(stored["memory"], points, plain, train, test)
    return {
        "runs": len(points),
        "closed_form": [round(v, 1) for v in percent(plain)],
        "held_out": [round(v, 1) for v in percent(error)],
    }


def draw(errors: dict[str, np.ndarray], rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured, by source: ten folds and left-out sources."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row["source"] for row in rows[1:]]
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.2), sharey=True)
    titles = ("one more run of a known stack (ten folds)", "a publication never seen")
    for axis, kind, title in zip(axes, ("tenths", "unseen"), titles, strict=True):
        for place, name in enumerate(names):
            chosen = errors["names"] == name
            values = 100 * np.expm1(np.atleast_2d(errors[kind])[0][chosen])
            axis.scatter(values, np.full(values.size, -place), s=14, alpha=0.5, color="#3366aa")
            middle = np.median(values)
            axis.plot([middle, middle], [-place - 0.35, -place + 0.35], color="#cc3311", lw=2)
        axis.axvspan(-5, 5, color="#66aa55", alpha=0.18, lw=0)
        axis.axvspan(-12, 12, color="#66aa55", alpha=0.12, lw=0)
        axis.axvline(0, color="0.5", lw=0.8)
        axis.set_xlim(-60, 60)
        row = rows[0]
        axis.set_title(f"{title}\nmedian {row[f'{kind}_median']}%, p90 {row[f'{kind}_p90']}%")
        axis.set_xlabel("predicted step time vs published (%)")
        axis.grid(axis="x", alpha=0.3)
    labels = [f"{row['source']} ({row['runs']})" for row in rows[1:]]
    axes[0].set_yticks([-k for k in range(len(names))], labels)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def refit_all() -> None:
    """Fit rates and widths on all stored runs and write them down."""
    records = load_points()
    points = [read_point(r) for r in records]
    measured = np.log([measured_seconds(r, p) for r, p in zip(records, points, strict=True)])
    rates, entry = fit_time(points, measured)
    sizes = [measured_bytes(r) for r in records]
    held = [(p, size) for p, size in zip(points, sizes, strict=True) if size]
    residual = np.array([math.log(size / job_memory(p.job).total) for p, size in held])
    memory = fit_memory([p for p, _ in held], residual)
    stored = {"constants": rounded(asdict(rates)), "time": entry, "memory": memory}
    DATA.write_text(json.dumps(stored, indent=1) + "\n")
    for cached in (constants, calibration, memory_calibration):
        cached.cache_clear()


def show(rows: list[dict[str, Any]], memory: dict[str, Any]) -> None:
    table = Table("source", "runs", "physics only", "ten folds", "halves", "source left out",
                  title="step time error, % (median / p90)")  # fmt: skip
    for row in rows:
        cells = [f"{row[f'{kind}_median']} / {row[f'{kind}_p90']}" for kind in KINDS]
        table.add_row(re.sub(r"\s+", " ", row["source"]), str(row["runs"]), *cells)
    console = Console()
    console.print(table)
    console.print(f"memory, {memory['runs']} runs: closed form {memory['closed_form']}, "
                  f"held out {memory['held_out']} % (median, p90)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--fit", action="store_true", help="fit anew and store the calibration")
    parser.add_argument("--refit", action="store_true", help="refit everything in each fold")
    options = parser.parse_args()
    if options.fit:
        refit_all()
    records = load_points()
    points = [read_point(r) for r in records]
    measured = np.log([measured_seconds(r, p) for r, p in zip(records, points, strict=True)])
    stored = json.loads(DATA.read_text())
    errors = validate(points, measured, stored, options.refit)
    rows, memory = summarise(errors), memory_errors(stored)
    show(rows, memory)
    result = {"refitted_in_each_fold": options.refit, "step_time": rows, "memory": memory}
    path = RESULTS.with_stem(RESULTS.stem + ("_refit" if options.refit else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    if not options.refit:
        draw(errors, rows, PICTURE)


if __name__ == "__main__":
    main()
