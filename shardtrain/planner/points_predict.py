"""Step time and memory of a published (or planned) run, every term shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from shardtrain.planner.calibration import Correction, calibration, constants, memory_calibration
from shardtrain.planner.memory import Memory, job_memory
from shardtrain.planner.points import Point, read_point
from shardtrain.planner.time import step_terms

FULL = 1.05
"""Share of a chip's memory that a run which did run can have filled: "80 GB" is nearly 80 GiB."""


@dataclass(frozen=True)
class Prediction:
    """What a run should take.

    Attributes:
        step_time: seconds per optimizer step.
        tokens_per_second_per_device: tokens of the step, per second and chip.
        memory_bytes: bytes per device at the peak.
        terms: named seconds that sum to `step_time`; the last two are the calibration: what the
            software stack takes beyond the physics, and what similar published runs add.
        error: standard deviation of log(step_time): 0.1 means 10% either way, two times in three.
        memory: bytes by class before calibration.
        evidence: (id of a published run, its pull on the log step time), strongest first.
        mfu: model FLOPs (causal attention, no recomputation) over the bf16 peak.
        point: how the record was read.
    """

    step_time: float
    tokens_per_second_per_device: float
    memory_bytes: float | None
    terms: Mapping[str, float]
    error: float
    memory: Memory
    evidence: tuple[tuple[str, float], ...]
    mfu: float
    point: Point

    def __rich__(self) -> Table:
        table = Table("term", "seconds", "share", title=f"{self.point.id}: {self.step_time:.3f} s")
        for name, seconds in self.terms.items():
            if abs(seconds) > 1e-4 * self.step_time:
                table.add_row(name, f"{seconds:.4f}", f"{seconds / self.step_time:.1%}")
        return table


def predict(point: Point) -> Prediction:
    """The prediction for a point."""
    job = point.job
    physics = step_terms(job, constants())
    correction = calibration().correct(point)
    terms = calibrated(physics, correction)
    step = sum(terms.values())
    memory = job_memory(job)
    peak = memory.total * memory_calibration().correct(point).factor
    peak = min(peak, FULL * job.chip.memory)
    rate = job.step_tokens / job.chips / step
    mfu = rate * job.model.flops_per_token(job.sequence) / job.chip.peak_flops()
    return Prediction(
        step, rate, peak, terms, correction.error, memory, correction.evidence, mfu, point
    )


def calibrated(physics: Mapping[str, float], correction: Correction) -> dict[str, float]:
    """Physical terms plus the seconds that calibration adds (or takes away)."""
    total = sum(physics.values())
    scaled = {"stack": correction.constant, "similar": correction.similarity}
    added = correction.factor - 1
    exponent = correction.constant + correction.similarity
    share = {k: v / exponent if abs(exponent) > 1e-12 else 0.0 for k, v in scaled.items()}
    return dict(physics) | {name: total * added * part for name, part in share.items()}


def predict_point(record: Mapping[str, Any]) -> Prediction:
    """Step time, throughput and memory of one published run, from its description alone.

    Args:
        record: id, framework, model, hardware, parallel and source of a run, as in
            `data/measured_points.json`; measured values and notes are not read. Missing fields
            get the usual defaults, a model without dims is looked up by name.

    Raises:
        HardwareError: the chip is unknown.

    Example:
        >>> record = {"framework": "MaxText", "model": {"name": "llama3-8b", "seq_len": 8192},
        ...           "hardware": {"chip": "TPUv6e", "count": 8},
        ...           "parallel": {"per_device_batch": 3, "precision": "bf16", "remat": "custom"}}
        >>> 2 < predict_point(record).step_time < 6
        True
    """
    return predict(read_point(record))
