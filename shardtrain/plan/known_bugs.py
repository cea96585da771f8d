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

from shardtrain.errors import CompilerBugError
from shardtrain.partitioning.infer.source import source_line
from shardtrain.plan.kernel_gradient import kernel_gradient
from shardtrain.plan.layout import Layout
from shardtrain.replay import bind, bodies, contains, read, reopen, start
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
        opened = bool(bodies(eqn)) or name == _CONV or name == "while"
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


# -- rewriting --------------------------------------------------------------------------------


def _evaluate(closed: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    env = start(closed, args)
    for eqn in closed.jaxpr.eqns:
        ins = [read(env, a) for a in eqn.invars]
        inside = bodies(eqn)
        if _grouped(eqn):
            outs = [grouped_convolution(eqn)(*ins)]
        elif inside and contains(eqn, _grouped):
            outs = reopen(eqn, ins, [lambda *args, b=b: _evaluate(b, args) for b in inside])
        else:
            outs = bind(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(env, a) for a in closed.jaxpr.outvars]


def grouped_convolution(eqn: jex.JaxprEqn) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A traced grouped convolution as a function of input and kernel, with its own gradient."""
    p = eqn.params
    plain = lambda lhs, rhs: bind(eqn, [lhs, rhs])[0]
    conv = jax.custom_vjp(plain)

    def backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> Any:
        lhs, rhs = saved
        (input_grad,) = jax.vjp(lambda x: plain(x, rhs), lhs)[1](grad)
        return input_grad, kernel_gradient(lhs, grad, rhs.shape, rhs.dtype, p)

    conv.defvjp(lambda lhs, rhs: (plain(lhs, rhs), (lhs, rhs)), backward)
    return conv
