"""What published runs teach beyond the physics: a stack constant and the pull of similar runs.

The model of a measured step time is

    log measured = log physics + constant(software, chip, precision) + similarity residual + noise

The constant is hierarchical: software, software on this chip, software on this chip in this
precision, each with its own prior width, so that a stack seen twice is believed a little and a
stack never seen gets only what all stacks have in common. The residual is a Gaussian process
(kriging; Rasmussen and Williams 2006, ch. 2) whose covariance falls with every difference between
two runs: another code base, model, chip, precision, sequence length, tokens per microbatch,
parallel layout. Both are solved together, so every prediction can name the published runs that
moved it. Widths and penalties were fitted by `calibration_fit.py` and are in
`data/calibration.json`.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from shardtrain.planner.memory import GIB, job_memory
from shardtrain.planner.points import Point, load_points, read_point
from shardtrain.planner.points_stack import embedding_stages
from shardtrain.planner.time import step_terms
from shardtrain.planner.time_constants import Constants

LABELS = (
    "family", "group", "chip", "generation", "recipe", "model", "mixture", "remat", "task",
    "sharding", "era", "ends", "kernels",
)  # fmt: skip
MEASURES = (
    "sequence", "tokens", "active", "params", "chips", "tensor", "pipeline", "virtual", "expert",
    "context", "microbatches", "version", "head", "layers",
)  # fmt: skip
LEVELS = ("all", "chip", "family", "family+chip", "family+chip+recipe")

_GENERATION = {
    "gb300": "blackwell", "gb200": "blackwell", "b200": "blackwell", "b300": "blackwell",
    "h100": "hopper", "h200": "hopper", "gh200": "hopper", "a100": "ampere", "a100-40gb": "ampere",
}  # fmt: skip


def era(point: Point) -> str:
    """Which generation of mixture kernels a release has; they changed in steps, not steadily."""
    if not point.job.model.experts or not point.stack.version:
        return "any"
    edges = (25.9, 26.1, 26.45)
    return str(sum(point.stack.version > edge for edge in edges))


def labels(point: Point) -> tuple[str, ...]:
    """The categories two runs can share, in the order of `LABELS`."""
    job, name = point.job, point.job.chip.name
    sharding = "none" if job.fsdp <= 1 else f"zero{job.zero}"
    return (
        point.stack.family, point.stack.group, name, _GENERATION.get(name, name), point.recipe,
        job.model.name, str(bool(job.model.experts)), job.remat, point.task, sharding,
        era(point), str(embedding_stages(job.model, job.pipeline)), point.kernels,
    )  # fmt: skip


def measures(point: Point) -> tuple[float, ...]:
    """The quantities two runs can differ in, mostly in doublings, in the order of `MEASURES`."""
    job, log = point.job, math.log2
    return (
        log(job.sequence), log(job.tokens), log(job.model.active_matmul), log(job.model.params),
        log(job.chips), log(job.tensor), log(job.pipeline), log(job.virtual_stages),
        log(job.expert), log(job.context), log(max(job.num_microbatches, 0.5)),
        4 * point.stack.version, 2 * log(job.model.head_dim), log(job.model.layers),
    )  # fmt: skip


@dataclass(frozen=True)
class Widths:
    """Covariance parameters.

    Attributes:
        levels: standard deviation of each level of the constant, as in `LEVELS`.
        similarity: standard deviation of the similarity residual.
        labels: penalty for a differing category, as in `LABELS`.
        measures: penalty per unit of difference, as in `MEASURES`.
        noise: standard deviation of what repeats of one run differ by.
    """

    levels: tuple[float, ...]
    similarity: float
    labels: tuple[float, ...]
    measures: tuple[float, ...]
    noise: float


@dataclass(frozen=True)
class Features:
    """Labels (as strings) and measures of some points, as arrays."""

    labels: np.ndarray
    measures: np.ndarray


def features(points: Sequence[Point]) -> Features:
    """Features of points: labels `[n, 13]` str, measures `[n, 14]` float."""
    return Features(np.array([labels(p) for p in points]), np.array([measures(p) for p in points]))


def same_levels(same: np.ndarray) -> list[np.ndarray]:
    """For each of `LEVELS` the 0/1 matrix of runs that share that constant."""
    family, chip, recipe = same[..., 0], same[..., 2], same[..., 4]
    return [np.ones_like(chip), chip, family, family * chip, family * chip * recipe]


def covariance(a: Features, b: Features, widths: Widths) -> tuple[np.ndarray, np.ndarray]:
    """(constant, similarity) covariance between points a `[n]` and b `[m]`, both `[n, m]`."""
    same = (a.labels[:, None, :] == b.labels[None, :, :]).astype(float)
    apart = np.abs(a.measures[:, None, :] - b.measures[None, :, :])
    constant = sum(w**2 * part for w, part in zip(widths.levels, same_levels(same), strict=True))
    penalty = (1 - same) @ np.array(widths.labels) + apart @ np.array(widths.measures)
    return np.asarray(constant), widths.similarity**2 * np.exp(-penalty)


@dataclass(frozen=True)
class Correction:
    """What calibration adds to a physical prediction.

    Attributes:
        constant: log factor of the software stack on this chip and precision.
        similarity: log factor from similar published runs.
        error: standard deviation of the log of the prediction, before seeing this run.
        evidence: (id of a published run, its pull on the log step time), strongest first.
    """

    constant: float
    similarity: float
    error: float
    evidence: tuple[tuple[str, float], ...]

    @property
    def factor(self) -> float:
        """Multiplier of the physical step time."""
        return math.exp(self.constant + self.similarity)


class Calibration:
    """Published points solved for a set of widths; made once, then read only."""

    def __init__(
        self, points: Sequence[Point], log_residual: np.ndarray, noise: np.ndarray, widths: Widths
    ) -> None:
        """Solve.

        Args:
            points: the published runs.
            log_residual: log(measured / physics) of each, `[n]` float.
            noise: multiplier of the noise variance of each, `[n]` float; above 1 for outliers.
            widths: covariance parameters.
        """
        self.points, self.widths = tuple(points), widths
        self._features = features(points)
        constant, similarity = covariance(self._features, self._features, widths)
        total = constant + similarity + np.diag(widths.noise**2 * noise)
        self._inverse = np.linalg.inv(total)
        self._weights = self._inverse @ log_residual

    def correct(self, point: Point) -> Correction:
        """The correction for a run that need not be among the points."""
        constant, similarity = covariance(features([point]), self._features, self.widths)
        row = (constant + similarity)[0]
        prior = sum(w**2 for w in self.widths.levels) + self.widths.similarity**2
        variance = max(0.0, prior - row @ self._inverse @ row) + self.widths.noise**2
        pulls = similarity[0] * self._weights
        order = np.argsort(-np.abs(pulls))[:3]
        evidence = tuple((self.points[i].id, float(pulls[i])) for i in order)
        return Correction(
            float(constant[0] @ self._weights), float(pulls.sum()), math.sqrt(variance), evidence
        )


def _stored() -> dict[str, Any]:
    text = resources.files("shardtrain.planner").joinpath("data/calibration.json").read_text()
    return json.loads(text)


def stored_widths(table: Mapping[str, Any]) -> Widths:
    """Widths from the stored JSON object (named entries)."""
    return Widths(
        tuple(table["levels"][name] for name in LEVELS),
        table["similarity"],
        tuple(table["labels"][name] for name in LABELS),
        tuple(table["measures"][name] for name in MEASURES),
        table["noise"],
    )


@functools.cache
def constants() -> Constants:
    """The fitted rates and overlaps of the time model."""
    return Constants(**_stored()["constants"])


def measured_seconds(record: Mapping[str, Any], point: Point) -> float:
    """Step seconds of a stored record."""
    return point.job.step_tokens / point.job.chips / record["tokens_per_s_per_device"]


def measured_bytes(record: Mapping[str, Any]) -> float | None:
    """Bytes per device of a stored record, where its source prints them.

    Sources that print "GB" read them from nvidia-smi, which counts in 2**30.
    """
    size = record.get("memory_gib") or record.get("memory_gb")
    return None if not size else float(size) * GIB


def solve(
    points: Sequence[Point], residual: Sequence[float], stored: Mapping[str, Any]
) -> Calibration:
    """A calibration of points with the stored widths and noise multipliers."""
    noise = np.array([stored["noise_factor"].get(p.id, 1.0) for p in points])
    return Calibration(points, np.array(residual), noise, stored_widths(stored))


@functools.cache
def calibration() -> Calibration:
    """Step time: the calibration on all stored points (about a tenth of a second, once)."""
    rates, points, residual = constants(), [], []
    for record in load_points():
        point = read_point(record)
        physics = sum(step_terms(point.job, rates).values())
        points.append(point)
        residual.append(math.log(measured_seconds(record, point) / physics))
    return solve(points, residual, _stored()["time"])


@functools.cache
def memory_calibration() -> Calibration:
    """Bytes per device: the calibration on the stored points that print memory."""
    points, residual = [], []
    for record in load_points():
        size = measured_bytes(record)
        if size is not None:
            point = read_point(record)
            points.append(point)
            residual.append(math.log(size / job_memory(point.job).total))
    return solve(points, residual, _stored()["memory"])
