"""A bad step once more, slowly: where does it begin to be not finite?

The state is the checkpoint that `bad_steps.jsonl` names, or the first state, brought up to the step
by the same batches; what other steps left out is left out here too. Then everything is looked at in
the order in which it is used: batch, parameters, optimizer state, the output of every module,
gradients.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.checkpoint import Checkpointer
from shardtrain.data import DataLoader
from shardtrain.errors import ShardtrainError
from shardtrain.monitoring import bad_steps
from shardtrain.monitoring.bad_steps import BadStep
from shardtrain.plan import Plan
from shardtrain.plan.loss import make_loss
from shardtrain.pytree import leaves_by_path
from shardtrain.recovery.module_checks import checked
from shardtrain.recovery.watch import skip_step
from shardtrain.train import TrainState

_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """Something that is not finite.

    Args:
      what: "batch", "parameter", "optimizer state", "variable", "module", "loss" or "gradient".
      path: Of the array or module.
      where: Devices that hold it, rows of a batch, or what else is known.
    """

    what: str
    path: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} {self.path}".rstrip() + f": {self.where}"


@dataclass(frozen=True)
class ReplayReport:
    """What a replayed step showed.

    Args:
      step: Its number, from 1.
      replayed_from: Step of the state that the replay began with.
      loss: Of the replayed step.
      grad_norm: Of the replayed step.
      findings: In the order in which the step uses things; empty if all is finite.
      largest_gradients: Path and norm of the largest gradients, for a spike.
      recorded: What the run wrote down about it.
    """

    step: int
    replayed_from: int
    loss: float
    grad_norm: float
    findings: tuple[Finding, ...]
    largest_gradients: tuple[tuple[str, float], ...]
    recorded: BadStep | None

    @property
    def first(self) -> Finding | None:
        """Where it begins."""
        return next(iter(self.findings), None)

    def __str__(self) -> str:
        lines = [
            f"step {self.step}, replayed from step {self.replayed_from}: loss {self.loss:.6g}, "
            f"gradient norm {self.grad_norm:.6g}"
        ]
        if self.recorded is not None:
            lines.append(f"recorded: {self.recorded}")
        if self.first is not None:
            lines.append(f"first: {self.first}")
            lines += [f"  then {finding}" for finding in self.findings[1:_SHOWN]]
            if len(self.findings) > _SHOWN:
                lines.append(f"  and {len(self.findings) - _SHOWN} more")
            return "\n".join(lines)
        if self.recorded is not None and self.recorded.reason == "not finite":
            lines.append(
                "everything is finite this time: the cause was not in the data or the program, but "
                "in a device or its memory"
            )
        lines.append("largest gradients:")
        lines += [f"  {path}: norm {norm:.6g}" for path, norm in self.largest_gradients]
        return "\n".join(lines)


def replay_step(
    plan: Plan,
    loader: DataLoader,
    directory: str | Path,
    step: int | None = None,
    *,
    seed: int = 0,
) -> ReplayReport:
    """Re-execute one step of a run of `st.fit` and find where it is not finite.

    Args:
      plan: As in the run; another mesh gives the same numbers up to rounding.
      loader: As in the run.
      directory: Of the run. Nothing in it is changed.
      step: Its number in the metrics, from 1; None: the last bad one.
      seed: Of the run's first state, where no record says it.

    Raises:
      ShardtrainError: No step is recorded as bad, or it cannot be reached.
    """
    if jax.process_count() > 1:
        raise ShardtrainError("replay runs in one process; any number of devices will do")
    path = Path(directory).expanduser().resolve()
    known = bad_steps.read(path)
    if step is None:
        if not known:
            raise ShardtrainError(f"no bad step is recorded in {path}; name one with step=")
        step = max(known)
    record = known.get(step)
    state = _state_before(plan, path, step, record.seed if record else seed)
    began = int(state.step)
    while int(state.step) < step - 1:
        now = int(state.step)
        if now + 1 in known:
            state = skip_step(state)
        else:
            batch = loader.batch(now, plan.layout.batch_shardings)
            state, _ = jax.block_until_ready(plan.step(state, batch))
    batch = loader.batch(step - 1, plan.layout.batch_shardings)
    loader.close()
    return _examined(plan, state, batch, step, began, record)


def _state_before(plan: Plan, path: Path, step: int, seed: int) -> TrainState:
    """The newest saved state that has not seen the step, else the first one."""
    if step < 1:
        raise ShardtrainError(f"step {step}: steps are counted from 1")
    checkpointer = Checkpointer(path, plan)
    usable = [saved for saved in checkpointer.steps() if saved < step]
    if usable:
        return checkpointer.restore(usable[-1])
    return plan.init(seed)


def _examined(
    plan: Plan, state: TrainState, batch: Any, step: int, began: int, record: BadStep | None
) -> ReplayReport:
    findings = [
        *_not_finite("batch", batch, rows=True),
        *_not_finite("parameter", plan.to_checkpoint(state).params),
        *_not_finite("optimizer state", state.opt_state),
        *_not_finite("variable", state.variables),
        *_bad_module(plan, state if plan.pipelined else plan.to_checkpoint(state), batch),
    ]
    key = jax.random.fold_in(state.rng, state.step)
    found = jax.jit(plan.gradients.grad_fn)(state.params, state.variables, batch, key)
    weight = found.output.loss.weight
    grads = jax.block_until_ready(jax.tree.map(lambda g: g / weight, found.grads))
    loss = float(found.output.loss.value)
    if not np.isfinite(loss):
        findings.append(Finding("loss", "", str(loss)))
    findings += _not_finite("gradient", grads)
    norms = {p: float(jnp.linalg.norm(g.ravel())) for p, g in leaves_by_path(grads).items()}
    largest = sorted(norms.items(), key=lambda item: -item[1])[:3]
    total = float(np.sqrt(sum(norm**2 for norm in norms.values())))
    return ReplayReport(step, began, loss, total, tuple(findings), tuple(largest), record)


def _bad_module(plan: Plan, state: TrainState, batch: Any) -> list[Finding]:
    """The module at which the forward pass of the whole batch stops being finite."""
    loss = make_loss(plan.form, plan.loss, plan.strategy, None)
    key = jax.random.fold_in(state.rng, state.step)
    with checked(plan.form) as checks:
        jax.block_until_ready(jax.jit(loss)(state.params, state.variables, batch, key))
        bad = checks.first_bad()
    if bad is None:
        return []
    inputs = "inputs are finite" if bad.inputs_finite else "inputs are not finite either"
    return [Finding("module", bad.path, f"output is not finite, {inputs}")]


def _not_finite(what: str, tree: Any, rows: bool = False) -> list[Finding]:
    """Leaves with a value that is not finite, each with the devices (and rows) concerned."""
    found = []
    for path, leaf in leaves_by_path(tree).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        bad = [s for s in leaf.addressable_shards if not np.isfinite(_host(s.data)).all()]
        if bad:
            where = "on " + ", ".join(str(shard.device) for shard in bad)
            if len(bad) == len(leaf.addressable_shards) > 1:
                where = f"on all {len(bad)} devices"
            found.append(Finding(what, path, f"{_rows(leaf)} {where}" if rows else where))
    return found


def _rows(leaf: jax.Array) -> str:
    values = _host(leaf)
    bad = ~np.isfinite(values.reshape(values.shape[0], -1)).all(axis=1)
    numbers = np.flatnonzero(bad).tolist()
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
    return f"row{'s' if len(numbers) > 1 else ''} {shown}"


def _host(x: Any) -> np.ndarray:
    """On the host, in a dtype that numpy can ask about."""
    return np.asarray(x).astype(np.complex64 if jnp.iscomplexobj(x) else np.float32)
