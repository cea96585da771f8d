"""Fits what `calibration.py` reads: rates of the time model and widths of the covariance.

Run by `benchmarks/planner_accuracy.py --fit`; nothing else imports it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares, minimize

from shardtrain.planner.calibration import (
    LABELS,
    LEVELS,
    MEASURES,
    Features,
    Widths,
    covariance,
    features,
    same_levels,
)
from shardtrain.planner.points import Point
from shardtrain.planner.time import step_terms
from shardtrain.planner.time_constants import NAMES, Constants

START = Widths(
    (0.05, 0.08, 0.1, 0.08, 0.06), 0.15, (0.5,) * len(LABELS), (0.1,) * len(MEASURES), 0.03
)

BOUNDS = {
    "matmul": (0.6, 1.0), "matmul_low": (0.4, 1.0), "matmul_four": (0.3, 0.9),
    "experts": (0.2, 1.0), "attention": (0.25, 0.95), "attention_older": (0.2, 0.9),
    "attention_tpu": (0.2, 0.9),
    "tensor_exposed": (0.2, 1.0), "expert_exposed": (0.2, 1.0), "context_exposed": (0.1, 1.0),
    "pipeline_exposed": (0.1, 1.0), "fsdp_exposed": (0.02, 0.5), "data_exposed": (0.05, 1.0),
    "link": (0.5, 0.95), "latency": (0.5, 3.0), "selective": (0.1, 0.8), "uneven": (0.05, 1.0),
    "misaligned": (0.05, 0.8),
}  # fmt: skip
"""Physical limits of the fitted rates; the others stay within a factor of five of the default."""


def physics(points: Sequence[Point], rates: Constants) -> np.ndarray:
    """Log physical step seconds of points, `[n]`."""
    return np.array([math.log(sum(step_terms(p.job, rates).values())) for p in points])


def fit_rates(
    points: Sequence[Point], log_measured: np.ndarray, total: np.ndarray, start: Constants
) -> Constants:
    """Rates of the time model by generalised least squares with a prior.

    Args:
        points: published runs.
        log_measured: log step seconds, `[n]`.
        total: covariance of what physics does not explain, `[n, n]`.
        start: where to start; the prior is centred on `Constants()`.
    """
    centre = np.array([getattr(Constants(), name) for name in NAMES])
    whiten = np.linalg.inv(np.linalg.cholesky(total))

    def residual(steps: np.ndarray) -> np.ndarray:
        rates = Constants(**dict(zip(NAMES, centre * np.exp(steps), strict=True)))
        return np.concatenate([whiten @ (log_measured - physics(points, rates)), steps / 0.5])

    limits = [BOUNDS.get(name, (c / 5, c * 5)) for name, c in zip(NAMES, centre, strict=True)]
    low = np.log([pair[0] for pair in limits] / centre)
    high = np.log([pair[1] for pair in limits] / centre)
    at = np.log(np.array([getattr(start, name) for name in NAMES]) / centre)
    at = np.clip(at, low + 1e-6, high - 1e-6)
    found = least_squares(residual, at, bounds=(low, high), loss="soft_l1", max_nfev=20)
    return Constants(**dict(zip(NAMES, (centre * np.exp(found.x)).tolist(), strict=True)))


def _flat(widths: Widths) -> np.ndarray:
    parts = (*widths.levels, widths.similarity, *widths.labels, *widths.measures, widths.noise)
    return np.log(np.array(parts))


def _widths(flat: np.ndarray) -> Widths:
    values = np.exp(flat).tolist()
    a, b = len(LEVELS), len(LEVELS) + 1 + len(LABELS)
    c = b + len(MEASURES)
    return Widths(
        tuple(values[:a]), values[a], tuple(values[a + 1 : b]), tuple(values[b:c]), values[c]
    )


def fit_widths(table: Features, residual: np.ndarray, noise: np.ndarray, start: Widths) -> Widths:
    """Widths that maximise the marginal likelihood of the residuals, with a weak prior.

    Args:
        table: features of the published runs.
        residual: log(measured / physics), `[n]`.
        noise: multiplier of the noise variance, `[n]`.
        start: where to start.
    """
    same = (table.labels[:, None, :] == table.labels[None, :, :]).astype(float)
    apart = np.abs(table.measures[:, None, :] - table.measures[None, :, :])
    levels = jnp.array(np.stack(same_levels(same)))
    same, apart, target = jnp.array(same), jnp.array(apart), jnp.array(residual)
    centre = jnp.array(_flat(START))
    a = len(LEVELS)
    b = a + 1 + len(LABELS)
    c = b + len(MEASURES)

    def loss(flat: jax.Array) -> jax.Array:
        w = jnp.exp(flat)
        penalty = (1 - same) @ w[a + 1 : b] + apart @ w[b:c]
        total = jnp.einsum("k,kij->ij", w[:a] ** 2, levels) + w[a] ** 2 * jnp.exp(-penalty)
        factor = jnp.linalg.cholesky(total + jnp.diag(w[c] ** 2 * jnp.array(noise)))
        white = jax.scipy.linalg.solve_triangular(factor, target, lower=True)
        fit = 0.5 * white @ white + jnp.log(jnp.diag(factor)).sum()
        return fit + 0.25 * jnp.sum((flat - centre) ** 2)

    step = jax.jit(jax.value_and_grad(loss))

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        found, slope = step(jnp.array(flat))
        return float(found), np.asarray(slope, float)

    found = minimize(value, _flat(start), jac=True, method="L-BFGS-B", options={"maxiter": 80})
    return _widths(found.x)


def outlier_noise(
    table: Features, residual: np.ndarray, widths: Widths, noise: np.ndarray
) -> np.ndarray:
    """Noise multipliers: a run that the others miss by many of its sigmas is believed less.

    One reweighting pass of a Student-t likelihood with four degrees of freedom, on
    leave-one-out residuals (Rasmussen and Williams 2006, eq. 5.12).
    """
    constant, similarity = covariance(table, table, widths)
    inverse = np.linalg.inv(constant + similarity + np.diag(widths.noise**2 * noise))
    variance = 1 / np.diag(inverse)
    missed = (inverse @ residual) * variance
    return np.clip((4 + missed**2 / variance) / 5 * missed**2 / variance, 1.0, 20.0)


def fit_time(
    points: Sequence[Point], log_measured: np.ndarray, rounds: int = 2
) -> tuple[Constants, dict[str, Any]]:
    """Rates of the time model, and the entry "time" of `data/calibration.json`.

    Args:
        points: published runs.
        log_measured: log step seconds, `[n]`.
        rounds: alternations between rates and widths.
    """
    table, noise = features(points), np.ones(len(points))
    rates, widths = Constants(), START
    for _ in range(rounds):
        constant, similarity = covariance(table, table, widths)
        total = constant + similarity + np.diag(widths.noise**2 * noise)
        rates = fit_rates(points, log_measured, total, rates)
        widths, noise = _settle(table, log_measured - physics(points, rates), noise, widths)
    return rates, _entry(points, widths, noise)


def fit_memory(points: Sequence[Point], residual: np.ndarray) -> dict[str, Any]:
    """The entry "memory": residual is log(measured / closed form) bytes per device, `[n]`."""
    table, noise = features(points), np.ones(len(points))
    widths, noise = _settle(table, residual, noise, START)
    widths, noise = _settle(table, residual, noise, widths)
    return _entry(points, widths, noise)


def _settle(
    table: Features, residual: np.ndarray, noise: np.ndarray, widths: Widths
) -> tuple[Widths, np.ndarray]:
    with jax.enable_x64(True):
        widths = fit_widths(table, residual, noise, widths)
    return widths, outlier_noise(table, residual, widths, np.ones(len(residual)))


def _entry(points: Sequence[Point], widths: Widths, noise: np.ndarray) -> dict[str, Any]:
    factor = {p.id: round(float(f), 2) for p, f in zip(points, noise, strict=True) if f > 1.5}
    return {**rounded(named(widths)), "noise_factor": factor}


def named(widths: Widths) -> dict[str, Any]:
    """Widths as a JSON object with named entries."""
    return {
        "levels": dict(zip(LEVELS, widths.levels, strict=True)),
        "similarity": widths.similarity,
        "labels": dict(zip(LABELS, widths.labels, strict=True)),
        "measures": dict(zip(MEASURES, widths.measures, strict=True)),
        "noise": widths.noise,
    }


def rounded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same object with four significant digits."""
    return {
        key: rounded(value) if isinstance(value, Mapping) else float(f"{value:.4g}")
        for key, value in tree.items()
    }
