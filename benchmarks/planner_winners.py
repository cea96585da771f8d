"""Is the planner's best layout at least as fast as the hand-tuned one that was published?

Every published run (by default each eighth, its layout seen once) is priced as it was run; then the
search looks for the best layout of the same model, chips, batch, sequence, precision and software
traits. Only layouts that fit by the memory model count, whether or not the published one does.

    python benchmarks/planner_winners.py    # prints, and writes results/planner_winners.json
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from shardtrain.hardware import Hardware
from shardtrain.planner.calibration import constants
from shardtrain.planner.job import Job
from shardtrain.planner.memory import job_memory
from shardtrain.planner.points import Point, load_points, read_point
from shardtrain.planner.search import search_layouts
from shardtrain.planner.search_space import Space
from shardtrain.planner.time import step_terms

RESULTS = Path(__file__).parent / "results" / "planner_winners.json"
TRAITS = ("slices", "flash", "runtime_bytes", "logit_bytes", "tuned_attention", "causal", "frozen",
          "gradient_bytes", "domain", "precision")  # fmt: skip
ROUNDING = 1e-4
LAYOUT = ("tensor", "pipeline", "context", "expert", "fsdp", "zero", "microbatch", "remat",
          "virtual_stages")  # fmt: skip


def machine(job: Job) -> Hardware:
    """The chips of a run as hosts."""
    if job.chip.kind == "tpu":
        return Hardware(job.chip, (job.chips,))
    each = min(job.chips, job.chip.chips_per_host)
    return Hardware(job.chip, (max(1, round(job.chips / each)), each))


def compare(point: Point) -> dict[str, Any]:
    """A published layout against the best one found."""
    job = point.job
    batch = round(job.microbatch * job.num_microbatches * job.replicas)
    traits = {name: getattr(job, name) for name in TRAITS}
    precision = job.precision if job.precision in ("bf16", "fp32") else "bf16"
    found = search_layouts(
        job.model, machine(job), batch, job.sequence, Space(precision=(precision,)),
        adjust=lambda candidate, _: candidate.replace(**traits),
    )  # fmt: skip
    published = sum(step_terms(job, constants()).values())
    best = found.ranked[0] if found.ranked else None
    return {
        "id": point.id,
        "model": job.model.name,
        "chips": f"{job.chips} x {job.chip.name}",
        "published": {name: getattr(job, name) for name in LAYOUT},
        "published_seconds": round(published, 4),
        "published_fits": job_memory(job).total <= job.chip.memory,
        "best": str(best.strategy) if best else found.advice,
        "best_seconds": round(best.step_time, 4) if best else None,
        "best_fits": best.memory.total <= job.chip.memory if best else None,
        "ratio": round(best.step_time / published, 4) if best else math.inf,
    }


def distinct(points: list[Point]) -> list[Point]:
    """Each layout once."""
    seen: dict[Any, Point] = {}
    for p in points:
        j = p.job
        key = (j.model.name, j.chip.name, j.chips, j.sequence, j.precision, j.num_microbatches)
        seen.setdefault((*key, *(getattr(j, name) for name in LAYOUT)), p)
    return list(seen.values())


def main(every: Annotated[int, tyro.conf.arg(metavar="N")] = 8) -> None:
    """Compare each N-th published layout with the planner's best.

    Args:
      every: N.
    """
    rows = [compare(p) for p in distinct([read_point(r) for r in load_points()])[::every]]
    good = [row for row in rows if row["ratio"] <= 1 + ROUNDING]
    fit = [row for row in rows if row["published_fits"]]
    both = [row for row in good if row["published_fits"]]
    summary = {
        "layouts": len(rows), "at_least_as_fast": len(good), "published_fits": len(fit),
        "at_least_as_fast_of_those": len(both),
        "best_does_not_fit": sum(row["best_fits"] is False for row in rows),
        "slower": [row for row in rows if row not in good], "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    print({name: value for name, value in summary.items() if isinstance(value, int)})


if __name__ == "__main__":
    tyro.cli(main)
