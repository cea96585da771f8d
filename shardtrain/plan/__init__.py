"""`st.plan`: from a model, a loss, an optimizer, a batch and a strategy to a `Plan`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from shardtrain.compile_cache import use_compile_cache
from shardtrain.errors import StrategyError
from shardtrain.hardware import Hardware
from shardtrain.hardware import hardware as find_hardware
from shardtrain.mesh import abstract_mesh, build_mesh, few_threads
from shardtrain.modules import model_form
from shardtrain.plan.core import Plan
from shardtrain.plan.inference import INFERRED_AXES, axis_table, infer_layout
from shardtrain.plan.layer_scan import find_layer_scan
from shardtrain.plan.layout import make_layout
from shardtrain.plan.loss import make_loss, user_loss
from shardtrain.plan.pipelined import make_pipelined
from shardtrain.plan.replicas import with_replicas
from shardtrain.plan.stages import stage_notes
from shardtrain.pytree import abstract
from shardtrain.strategy import Strategy


def plan(
    model: Any,
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    batch: Any,
    strategy: Strategy | str | None = None,
    hardware: Hardware | str | None = None,
    *,
    eval_fn: Callable[..., Any] | None = None,
    devices: Sequence[jax.Device] | None = None,
    donate: bool = True,
) -> Plan:
    """Resolve a strategy against a model: every array's sharding, and the step program.

    Allocates and compiles nothing.

    Args:
      model: A Linen module, an NNX module, a function `rngs -> nnx.Module` (never materialised on
        one device), or `st.Functional`. Not modified.
      loss_fn: `loss_fn(model, batch)` or `loss_fn(model, batch, rngs)`; may take a keyword
        `train`. Returns `st.Mean(total, weight)` or a scalar, or `(either, metrics)`.
      optimizer: Any optax transformation. Its schedule counts optimizer steps.
      batch: One global batch, real or abstract (`jax.ShapeDtypeStruct`s).
      strategy: A `Strategy` or its string; None: all devices as data replicas.
      hardware: Plan for hardware that is not here, e.g. "h100:8x8"; None: this machine's devices.
      eval_fn: Loss for `eval_step`; None: `loss_fn`.
      devices: The devices to use; None: all.
      donate: Reuse the old state's memory for the new one.

    Raises:
      ShardtrainError: Anything that would go wrong later, before anything is compiled.

    Example:
      >>> import jax.numpy as jnp, optax, shardtrain as st
      >>> model = st.Functional(init=lambda key: {"w": jnp.zeros((4,))})
      >>> loss = lambda v, batch: jnp.mean((batch["x"] @ v["w"] - batch["y"]) ** 2)
      >>> batch = {"x": jnp.ones((8, 4)), "y": jnp.ones((8,))}
      >>> p = plan(model, loss, optax.sgd(0.1), batch, Strategy(data=-1))
      >>> state, metrics = p.step(p.init(), batch)
      >>> float(metrics["loss"])
      1.0
    """
    if isinstance(strategy, str):
        strategy = Strategy.parse(strategy)
    strategy = strategy or Strategy(data=-1)
    use_compile_cache()
    _refuse_unavailable(strategy)
    if isinstance(optimizer, optax.MultiSteps):
        raise StrategyError(
            "optax.MultiSteps accumulates gradients over steps; here one step already can: "
            "Strategy(num_microbatches=...) splits the batch. To do both, pass "
            "MultiSteps(...).gradient_transformation()"
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise StrategyError(
            f"optimizer is a {type(optimizer).__name__}, not an optax.GradientTransformation such "
            "as optax.adamw(1e-3)"
        )
    given_optimizer = optimizer
    mesh = _mesh(strategy, hardware, devices)
    loss = user_loss(loss_fn)
    shapes = abstract(batch)
    example = lambda model, batch: loss(model, batch, jax.random.key(0), True)
    own_form = form = model_form(model, example, shapes)
    plain = strategy.replace(remat="none", precision="fp32", equal_microbatches=True)
    plain_loss = make_loss(form, loss, plain, None)
    table = functools.cache(lambda form=form: axis_table(form, plain_loss, shapes))
    inferred = _infer(table, form, strategy, mesh)
    layout = make_layout(form, optimizer, shapes, strategy, mesh, inferred)
    pipelined, scan, unscanned = None, None, ""
    if strategy.pipeline > 1:
        pipelined = make_pipelined(form, loss, optimizer, layout, strategy)
        form, layout, optimizer = pipelined.form, pipelined.layout, pipelined.optimizer
    else:
        scan, unscanned = find_layer_scan(form, loss, optimizer, layout, strategy)
        if scan is not None and scan.stacked is not None:
            pipelined = scan.stacked
            form, layout, optimizer = pipelined.form, pipelined.layout, pipelined.optimizer
    algorithm, layout, pipelined = with_replicas(strategy, layout, optimizer, pipelined)

    def again(**changes: Any) -> Plan:
        """The same model, loss, optimizer and batch under another strategy or on other devices."""
        given: dict[str, Any] = {"strategy": strategy, "hardware": hardware, "devices": devices}
        given |= {"eval_fn": eval_fn, "donate": donate} | changes
        return plan(own_form, loss_fn, given_optimizer, batch, **given)

    return Plan(
        form=form,
        loss=loss,
        eval_loss=user_loss(eval_fn) if eval_fn is not None else loss,
        optimizer=optimizer,
        strategy=strategy,
        layout=layout,
        donate=donate,
        again=again,
        example=None if _is_abstract(batch) else batch,
        hardware=None if hardware is None else str(hardware),
        findings=tuple(filter(None, (few_threads(mesh), unscanned, scan.note if scan else "")))
        + (inferred.findings if inferred is not None else ())
        + (stage_notes(pipelined) if pipelined is not None and scan is None else ()),
        pipelined=pipelined,
        layer_scan=scan,
        axis_table=table,
        algorithm=algorithm,
    )


def _infer(table: Any, form: Any, strategy: Strategy, mesh: Any) -> Any:
    """Axis inference, where the mesh has an axis whose use depends on the model."""
    sizes = dict(mesh.shape)
    if all(sizes[a] == 1 for a in INFERRED_AXES):
        return None
    return infer_layout(table(), form, strategy, sizes)


def _is_abstract(batch: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch))


def _mesh(strategy: Strategy, hardware: Hardware | str | None, devices: Any) -> Any:
    if hardware is None:
        return build_mesh(strategy, devices)
    return abstract_mesh(strategy, find_hardware(hardware).device_count)


def _refuse_unavailable(strategy: Strategy) -> None:
    """Fields whose machinery is not in this version are refused, never ignored."""
    asked = {
        "virtual_stages": strategy.virtual_stages > 1 and strategy.pipeline == 1,
        "offload": strategy.offload,
    }
    missing = [name for name, wanted in asked.items() if wanted]
    if missing:
        raise StrategyError(
            f"Strategy({missing[0]}={getattr(strategy, missing[0])!r}) is not available in this "
            "version" + (" without pipeline > 1" if missing[0] == "virtual_stages" else "")
        )


__all__ = ["Plan", "plan"]
