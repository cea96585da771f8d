"""Compiler bugs that give wrong numbers: found in the traced loss, avoided or refused by name.

Design: both bugs are in how XLA's partitioner splits the kernel gradient of a convolution, which
JAX writes as a convolution that contracts the batch (seen with jaxlib 0.10.2 and 0.11 on CPU,
Shardy on or off; reproduced in plain JAX by the tests):

- grouped convolution, batch split over some mesh axes while another of size m does not split it:
  the gradient comes back multiplied by m (one all-reduce over all devices). Here the kernel
  gradient is written as one contraction per kernel offset instead, which is partitioned rightly.
- any convolution mapped over replicas (one gradient per replica, reduced later): the batched
  kernel gradient is gathered, and wrong for some shapes. Such losses reduce in each microbatch.

The loss is rewritten as a jaxpr, so that it does not matter whose code calls the convolution.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax

from shardtrain.compat import scan_counts
from shardtrain.errors import CompilerBugError
from shardtrain.partitioning.infer.source import source_line
from shardtrain.plan.kernel_gradient import kernel_gradient
from shardtrain.plan.layout import Layout
from shardtrain.strategy import Strategy
from shardtrain.train import LossFn

_CONV = "conv_general_dilated"


@dataclass(frozen=True)
class KnownBugs:
    """Which compiler bugs a loss would meet.

    Args:
      idle_axes: Mesh axes of size > 1 that do not split the batch.
      convolutions: Source lines of convolutions.
      grouped: Source lines of grouped convolutions.
    """

    idle_axes: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()

    def avoid(self, loss: LossFn) -> LossFn:
        """The same loss, with kernel gradients that are partitioned rightly where needed."""
        return safe_kernel_gradients(loss) if self.idle_axes and self.grouped else loss


def check_known_bugs(loss: LossFn, layout: Layout, strategy: Strategy) -> KnownBugs:
    """Look for operations that the compiler is known to split wrongly on this mesh.

    Args:
      loss: `(params, variables, batch, key) -> (sums, new variables)`.
      layout: Shapes of its arguments, and the mesh.
      strategy: Axis sizes.

    Raises:
      CompilerBugError: An operation that is neither right on this mesh nor can be rewritten.
    """
    state, sizes = layout.state, layout.sizes
    idle = tuple(a for a, n in sizes.items() if n > 1 and a not in layout.batch_axes)
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    arguments = plain((state.params, state.variables, layout.batch, state.rng))
    found = list(_convolutions(jax.make_jaxpr(loss)(*arguments).jaxpr))
    if idle and layout.batch_axes:
        for eqn, line, inside in found:
            _refuse(eqn, line, inside, idle[0], sizes[idle[0]])
    lines = lambda wanted: tuple(dict.fromkeys(line for eqn, line, _ in found if wanted(eqn)))
    return KnownBugs(idle, lines(lambda eqn: True), lines(_grouped))


def safe_kernel_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose grouped convolutions have their own kernel gradient."""

    def safe(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return safe


# -- looking ----------------------------------------------------------------------------------


def _grouped(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name == _CONV and eqn.params["feature_group_count"] > 1


def _convolutions(
    jaxpr: Any, outer: str = "<unknown>", inside: str = ""
) -> Iterator[tuple[jex.JaxprEqn, str, str]]:
    """Convolutions with their source line and the operation that hides them, if any does."""
    for eqn in jaxpr.eqns:
        line = source_line(eqn, outer)
        if eqn.primitive.name == _CONV:
            yield eqn, line, inside
        name = eqn.primitive.name
        # `while` has no reverse-mode derivative, so nothing inside it is transposed.
        opened = name in _REPLAY or name == "while"
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from _convolutions(sub, line, inside or ("" if opened else name))


def _refuse(eqn: jex.JaxprEqn, line: str, inside: str, axis: str, size: int) -> None:
    if eqn.params["batch_group_count"] > 1:
        what = "a convolution with batch_group_count > 1 (a gradient taken inside the loss)"
    elif _grouped(eqn) and inside:
        what = f"a grouped convolution inside {inside}"
    else:
        return
    raise CompilerBugError(
        f"{line}: {what}. XLA multiplies the kernel gradient of such a convolution by {size} when "
        f"mesh axis {axis!r} (size {size}) does not split the batch, and here it cannot be "
        f"rewritten. Use {axis}=1 and give its devices to data or fsdp"
    )


def _has_grouped(eqn: jex.JaxprEqn) -> bool:
    subs = jex.jaxprs_in_params(eqn.params)
    return _grouped(eqn) or any(_has_grouped(e) for sub in subs for e in sub.eqns)


# -- rewriting --------------------------------------------------------------------------------


def _evaluate(closed: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
    for eqn in jaxpr.eqns:
        replay = _REPLAY.get(eqn.primitive.name) if _has_grouped(eqn) else None
        outs = (replay or _bind)(eqn, [read(a) for a in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _bind(eqn: jex.JaxprEqn, ins: list[Any]) -> list[Any]:
    """One equation as it was traced."""
    inputs: list[Any] = [jex.Var(a.aval) for a in eqn.invars]
    outputs = [jex.Var(v.aval) for v in eqn.outvars]
    alone = eqn.replace(invars=inputs, outvars=outputs)
    debug = jex.DebugInfo("known_bugs", "one equation", ("",) * len(inputs), ("",) * len(outputs))
    jaxpr = jex.Jaxpr((), inputs, outputs, [alone], eqn.effects, debug)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*ins)


def _as_function(jaxpr: Any) -> Callable[..., list[Any]]:
    closed = jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())
    return lambda *args: _evaluate(closed, args)


def _replay_conv(eqn: jex.JaxprEqn, ins: list[Any]) -> list[Any]:
    return [grouped_convolution(eqn)(*ins)]


def _replay_jit(eqn: jex.JaxprEqn, ins: list[Any]) -> list[Any]:
    return _as_function(eqn.params["jaxpr"])(*ins)


def _replay_remat(eqn: jex.JaxprEqn, ins: list[Any]) -> list[Any]:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(_as_function(eqn.params["jaxpr"]), **options)(*ins)


def _replay_scan(eqn: jex.JaxprEqn, ins: list[Any]) -> list[Any]:
    p = eqn.params
    body = _as_function(p["jaxpr"])
    first, carried = scan_counts(p)
    last = first + carried

    def step(carry: Any, xs: Any) -> Any:
        out = body(*ins[:first], *carry, *xs)
        return out[:carried], out[carried:]

    options = {name: p[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, ins[first:last], ins[last:], **options)
    return [*carry, *ys]


def _replay_cond(eqn: jex.JaxprEqn, ins: list[Any]) -> list[Any]:
    return lax.switch(ins[0], [_as_function(b) for b in eqn.params["branches"]], *ins[1:])


def grouped_convolution(eqn: jex.JaxprEqn) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A traced grouped convolution as a function of input and kernel, with its own gradient."""
    p = eqn.params
    plain = lambda lhs, rhs: _bind(eqn, [lhs, rhs])[0]
    conv = jax.custom_vjp(plain)

    def backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> Any:
        lhs, rhs = saved
        (input_grad,) = jax.vjp(lambda x: plain(x, rhs), lhs)[1](grad)
        return input_grad, kernel_gradient(lhs, grad, rhs.shape, rhs.dtype, p)

    conv.defvjp(lambda lhs, rhs: (plain(lhs, rhs), (lhs, rhs)), backward)
    return conv


_REPLAY: dict[str, Callable[[jex.JaxprEqn, list[Any]], list[Any]]] = {
    _CONV: _replay_conv,
    "jit": _replay_jit,
    "pjit": _replay_jit,
    "checkpoint": _replay_remat,
    "remat": _replay_remat,
    "remat2": _replay_remat,
    "scan": _replay_scan,
    "cond": _replay_cond,
}
