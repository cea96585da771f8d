"""One sharded step against one device: loss, gradient norm, every parameter's gradient."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from zoo import Case

import shardtrain as st
from shardtrain.pytree import leaves_by_path

ROWS = 16

KEEP_GRADIENT = optax.chain(optax.trace(decay=0.0), optax.sgd(0.1))
"""Plain SGD whose state is the gradient itself, averaged and clipped as the optimizer sees it."""


@dataclass(frozen=True)
class Outcome:
    loss: float
    grad_norm: float
    metrics: dict[str, float]
    grads: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    variables: dict[str, np.ndarray]


def starting_point(case: Case, devices: Any) -> Any:
    """Initial values of a zoo model, drawn once, on one device."""
    strategy = st.Strategy(equal_microbatches=case.scalar)
    batch = case.batch(ROWS, 0)
    plan = st.plan(case.make(), case.loss, KEEP_GRADIENT, batch, strategy, devices=devices[:1])
    made = plan.model(plan.init(0))
    return made[1] if plan.form.kind == "linen" else made


def one_step(case: Case, strategy: st.Strategy, devices: Any, start: Any = None) -> Outcome:
    """One step of a zoo model under a strategy, from `start` or from its own initial values."""
    batch = case.batch(ROWS, 0)
    # Numbers are compared here, not layouts: what no axis divides may stay whole.
    strategy = strategy.replace(allow_replicated="**", equal_microbatches=case.scalar)
    plan = st.plan(case.make(), case.loss, KEEP_GRADIENT, batch, strategy, devices=devices)
    state, metrics = plan.step(plan.init(0, variables=start), batch)
    values = {name: float(value) for name, value in metrics.items()}
    assert plan.trace_counts["step"] == 1
    state = plan.to_checkpoint(state)  # layers of a pipeline come back one by one
    arrays = lambda tree: {p: _numpy(x) for p, x in leaves_by_path(tree).items()}
    return Outcome(
        values.pop("loss"),
        values.pop("grad_norm"),
        values,
        arrays(state.opt_state[0].trace),
        arrays(state.params),
        arrays(state.variables),
    )


def _numpy(x: jax.Array) -> np.ndarray:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def differences(found: Outcome, wanted: Outcome, tolerance: float) -> list[str]:
    """What differs, by name; gradients relative to the norm of the whole gradient."""
    lines = []
    if abs(found.loss - wanted.loss) > tolerance * abs(wanted.loss):
        lines.append(f"loss {found.loss} is not {wanted.loss}")
    if abs(found.grad_norm - wanted.grad_norm) > tolerance * wanted.grad_norm:
        lines.append(f"grad_norm {found.grad_norm} is not {wanted.grad_norm}")
    for name, value in wanted.metrics.items():
        if abs(found.metrics[name] - value) > tolerance * max(abs(value), 1e-3):
            lines.append(f"metric {name} {found.metrics[name]} is not {value}")
    assert found.grads.keys() == wanted.grads.keys()
    for path, grad in wanted.grads.items():
        error = float(np.linalg.norm(found.grads[path] - grad)) / wanted.grad_norm
        if not error <= tolerance:
            ratio = np.linalg.norm(found.grads[path]) / max(np.linalg.norm(grad), 1e-30)
            lines.append(f"gradient of {path}: error {error:.1e} of the norm, ratio {ratio:.4f}")
    for path, value in wanted.variables.items():
        if not np.allclose(found.variables[path], value, rtol=tolerance, atol=tolerance):
            lines.append(f"variable {path}")
    return lines
