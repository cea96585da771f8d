"""`st.verify`: the plan against the same training on one device, number by number.

Design: every step starts from the *same* state on both sides (the reference's, copied), so that
differences cannot grow from step to step and each one found has its cause in that step. Loss and
gradients are compared first; values after the update only where the gradient is not itself noise,
because Adam turns a gradient of rounding noise into an update of full size.

Tolerance: a float32 sum of n terms in another order differs by about eps * sqrt(n) of its size.
`n` is the number of elements of one global batch; 32 covers the depth of ordinary networks. An
array much smaller than the others is compared on their scale, since its rounding errors come from
sums of theirs. A bug (a missing reduction, a wrong divisor, a swapped shard) is off by far more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import VerificationError
from shardtrain.plan import Plan
from shardtrain.plan.placement import own
from shardtrain.plan.replicas import refuse_verify
from shardtrain.pytree import leaves_by_path
from shardtrain.strategy import AXES
from shardtrain.tables import Table

EPS = 2.0**-23
NOISE = 100
"""Numbers whose gradient is below this many roundings of the array's largest are not compared."""
FLOOR = 0.01
"""An array is compared on a scale of at least this share of the average array's norm."""


@dataclass(frozen=True)
class Difference:
    """One array on one device and on the plan.

    Args:
      step: Which step.
      kind: "loss", "grad", "param" or "variable".
      path: Path of the array ("" for the loss).
      error: Norm of the difference over the scale.
      tolerance: What rounding explains.
    """

    step: int
    kind: str
    path: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains it; NaN on one side only does not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        name = f"{self.kind} of {self.path}" if self.path else self.kind
        return (
            f"step {self.step}: {name} differs by {self.error:.2g} (rounding: {self.tolerance:.1g})"
        )


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Args:
      strategy: The strategy that was compared.
      differences: Every comparison, in the order in which a bug would show first.
      num_steps: Steps compared.
      suspects: Mesh axes that differ from one device when used alone.
    """

    strategy: str
    differences: tuple[Difference, ...]
    num_steps: int
    suspects: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything agrees to rounding."""
        return all(d.ok for d in self.differences)

    @property
    def first_difference(self) -> Difference | None:
        """The first array that rounding does not explain."""
        return next((d for d in self.differences if not d.ok), None)

    @property
    def worst(self) -> Difference:
        """The largest error relative to its tolerance."""
        return max(self.differences, key=lambda d: d.error / d.tolerance)

    def raise_if_failed(self) -> None:
        """For tests.

        Raises:
          VerificationError: Says what differs first and which axis is suspect.
        """
        if not self.passed:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        if self.passed:
            return (
                f"PASS: loss, gradients, parameters and variables of {self.num_steps} steps under "
                f"{self.strategy} match one device to {self.worst.error:.1g} (float32 rounding "
                f"explains {self.worst.tolerance:.1g})"
            )
        first = self.first_difference
        bad = [d for d in self.differences if not d.ok]
        forward = not any(d.kind == "loss" for d in bad)
        said = "; the loss matches" if forward else ""
        suspect = (
            f"; suspect: mesh axis {', '.join(self.suspects)} (alone it differs too)"
            if self.suspects
            else "; no single axis alone differs: suspect a combination"
        )
        return f"FAIL under {self.strategy}: {first}{said}{suspect}"

    def table(self) -> Table:
        """Worst error of each array over the steps."""
        worst: dict[tuple[str, str], Difference] = {}
        for d in self.differences:
            key = (d.kind, d.path)
            if key not in worst or not d.error <= worst[key].error:
                worst[key] = d
        rows = tuple(
            (
                d.kind,
                d.path,
                str(d.step),
                f"{d.error:.2g}",
                f"{d.tolerance:.1g}",
                "ok" if d.ok else "DIFFERS",
            )
            for d in worst.values()
        )
        return Table(str(self), ("what", "path", ">step", ">error", ">rounding", ""), rows)

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def verify(
    plan: Plan,
    num_steps: int = 3,
    batches: Sequence[Any] | None = None,
    seed: int = 0,
    find_suspect: bool = True,
) -> VerifyReport:
    """Compare a plan with the same training on one device, in float32.

    Args:
      plan: What to check. Its strategy, with precision fp32, runs on its own devices; the
        reference runs on one of them with the same number of microbatches.
      num_steps: Steps to compare; each from the reference's state.
      batches: Global batches; None: the plan's example batch with its rows rotated, or made-up
        numbers (integers 0 and 1) where the plan was given shapes only.
      seed: Of the first state.
      find_suspect: On failure, try each mesh axis alone.

    Returns:
      A report; `report.raise_if_failed()` in tests.

    Example:
      >>> import optax, shardtrain as st
      >>> model = st.Functional(init=lambda key: {"w": jax.random.normal(key, (4, 2))})
      >>> loss = lambda v, b: st.cross_entropy(b["x"] @ v["w"], b["y"])
      >>> batch = {"x": np.ones((8, 4), "f"), "y": np.zeros(8, "i")}
      >>> st.verify(st.plan(model, loss, optax.sgd(0.1), batch, "data=-1")).passed
      True
    """
    plan._need_devices("verify")
    if plan.algorithm is not None:
        refuse_verify(plan.strategy)
    if plan.strategy.precision != "fp32":
        plan = plan.again(strategy=plan.strategy.replace(precision="fp32"))
    reference = _reference(plan)
    batches = list(batches) if batches is not None else _batches(plan, num_steps, seed)
    batches = [batches[i % len(batches)] for i in range(num_steps)]
    found = tuple(_compare(plan, reference, batches, seed))
    report = VerifyReport(str(plan.strategy), found, num_steps)
    if report.passed or not find_suspect:
        return report
    suspects = tuple(axis for axis in AXES if _differs_alone(plan, reference, axis, batches, seed))
    return VerifyReport(report.strategy, found, num_steps, suspects)


def _reference(plan: Plan) -> Plan:
    sizes = dict.fromkeys(AXES, 1)
    single = plan.strategy.replace(
        **sizes, dcn={}, zero=0, rules={}, virtual_stages=1, scan_layers=False
    )
    return plan.again(strategy=single, devices=list(plan.mesh.devices.flat)[:1], donate=False)


def _compare(plan: Plan, reference: Plan, batches: Sequence[Any], seed: int) -> list[Difference]:
    count = max(sum(x.size for x in jax.tree.leaves(plan.layout.batch)), 1)
    tolerance = EPS * (32 + 4 * math.sqrt(count))
    ours, theirs = _gradients(plan), _gradients(reference)
    state, differences = reference.init(seed), []
    for step, batch in enumerate(batches):
        copied = _copy(state, plan)
        mine, expected = ours(copied, plan.place(batch)), theirs(state, reference.place(batch))
        new, new_expected = plan.step(copied, batch)[0], reference.step(state, batch)[0]
        differences.append(_difference(step, "loss", "", mine[0], expected[0], tolerance))
        grads = leaves_by_path(expected[1])
        scale = _scale(grads)
        new = plan.to_checkpoint(new)
        for path, value in leaves_by_path(_unstacked(plan, mine[1])).items():
            differences.append(
                _difference(step, "grad", path, value, grads[path], tolerance, scale)
            )
        before = leaves_by_path(state.params)
        after = leaves_by_path(new_expected.params)
        for path, value in leaves_by_path(new.params).items():
            # Single numbers whose gradient is rounding noise move by the whole learning rate
            # under Adam, in a direction that means nothing.
            gradient = np.abs(_host(grads[path]))
            clear = gradient > max(NOISE * tolerance * gradient.max(initial=0), FLOOR * scale * EPS)
            if _norm(gradient) < FLOOR * scale or not clear.any():
                continue
            mine_now, theirs_now = _host(value)[clear], _host(after[path])[clear]
            moved = _norm(theirs_now - _host(before[path])[clear])
            size = max(moved, 1e-3 * _norm(theirs_now))
            differences.append(
                _difference(step, "param", path, mine_now, theirs_now, 30 * tolerance, size, True)
            )
        others = leaves_by_path(new_expected.variables)
        for path, value in leaves_by_path(new.variables).items():
            if jnp.issubdtype(value.dtype, jnp.floating):
                differences.append(
                    _difference(step, "variable", path, value, others[path], tolerance)
                )
        state = new_expected
    return differences


def _gradients(plan: Plan) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Loss and mean gradients of one batch, without an update."""

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(state.rng, state.step)
        found = plan.gradients.grad_fn(state.params, state.variables, batch, key)
        weight = jnp.maximum(found.output.loss.weight, 1e-30)
        return found.output.loss.value, jax.tree.map(lambda g: g / weight, found.grads)

    layout = plan.layout
    return jax.jit(run, in_shardings=(layout.state_shardings, layout.batch_shardings))


def _unstacked(plan: Plan, grads: Any) -> Any:
    return grads if plan.pipelined is None else plan.pipelined.unstack_params(grads)


def _copy(state: Any, plan: Plan) -> Any:
    if plan.pipelined is not None:
        state = plan.pipelined.stack(state)
    return jax.tree.map(own, state, plan.layout.state_shardings)


def _difference(
    step: int,
    kind: str,
    path: str,
    value: Any,
    expected: Any,
    tolerance: float,
    scale: float = 0.0,
    exact_scale: bool = False,
) -> Difference:
    a, b = _host(value), _host(expected)
    if a.shape != b.shape:
        return Difference(step, kind, path, math.inf, tolerance)
    if np.array_equal(a, b, equal_nan=True):
        return Difference(step, kind, path, 0.0, tolerance)
    size = scale if exact_scale else max(_norm(b), FLOOR * scale, 1e-30)
    error = _norm(a - b) / max(size, 1e-30)
    return Difference(step, kind, path, error if error == error else math.inf, tolerance)


def _host(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _norm(x: Any) -> float:
    return float(np.linalg.norm(_host(x)))


def _scale(grads: dict[str, Any]) -> float:
    """Norm of the average array (root mean square of the norms)."""
    return math.sqrt(sum(_norm(g) ** 2 for g in grads.values()) / max(len(grads), 1))


def _batches(plan: Plan, count: int, seed: int) -> list[Any]:
    if plan.example is not None:
        rotate = lambda x, i: np.roll(np.asarray(x), i, axis=0) if np.ndim(x) else np.asarray(x)
        return [jax.tree.map(lambda x, i=i: rotate(x, i), plan.example) for i in range(count)]
    random = np.random.default_rng(seed)

    def made_up(leaf: Any) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return random.normal(size=leaf.shape).astype(leaf.dtype)
        return random.integers(0, 2, leaf.shape).astype(leaf.dtype)

    return [jax.tree.map(made_up, plan.layout.batch) for _ in range(count)]


def _differs_alone(
    plan: Plan, reference: Plan, axis: str, batches: Sequence[Any], seed: int
) -> bool:
    size = plan.layout.sizes[axis]
    if size == 1:
        return False
    sizes = {**dict.fromkeys(AXES, 1), axis: size}
    chunks = plan.strategy.virtual_stages if axis == "pipeline" else 1
    strategy = plan.strategy.replace(**sizes, dcn={}, virtual_stages=chunks)
    alone = plan.again(strategy=strategy, devices=list(plan.mesh.devices.flat)[:size])
    return any(not d.ok for d in _compare(alone, reference, batches[:1], seed))
