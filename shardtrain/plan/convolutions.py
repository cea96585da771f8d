"""Rewrites the convolutions of a loss as contractions (`plan.contraction`), by a rule.

The loss is rewritten as a jaxpr, so that it does not matter whose code calls the convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.plan.contraction import (
    contracted_convolution,
    kernel_gradient,
    num_contractions,
    num_offsets,
)
from shardtrain.replay import bind, bodies, contains, read, reopen, start

Rewritten = Callable[[jax.Array, jax.Array], jax.Array]
"""A convolution as a function of input and kernel."""
Rule = Callable[[jex.JaxprEqn], Rewritten | None]
"""What a convolution becomes; None: it stays."""

_MOST_CONTRACTIONS = 128  # a program of thousands of slices would not compile in reasonable time


def is_convolution(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation is a convolution."""
    return eqn.primitive.name == "conv_general_dilated"


def is_grouped(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation is a grouped (or depthwise) convolution."""
    return is_convolution(eqn) and eqn.params["feature_group_count"] > 1


# -- rules ------------------------------------------------------------------------------------


def split_rightly(eqn: jex.JaxprEqn) -> Rewritten | None:
    """For one loss over the whole batch: grouped convolutions."""
    if not is_grouped(eqn):
        return None
    return _contracted(eqn) if _gathers_the_batch(eqn) else _with_own_gradient(eqn)


def with_mapped_gradients(eqn: jex.JaxprEqn) -> Rewritten | None:
    """For a gradient per replica of the same kernels: every convolution."""
    return split_rightly(eqn) or _with_own_gradient(eqn)


def with_mapped_kernels(eqn: jex.JaxprEqn) -> Rewritten | None:
    """For replicas that may have different kernels: mapped, every convolution is a grouped one."""
    return _contracted(eqn)


def why_not_mapped(eqn: jex.JaxprEqn, whole: bool) -> str:
    """Why a convolution cannot be mapped over replicas, or "".

    Args:
      eqn: A convolution.
      whole: The convolution itself, not only its kernel gradient.
    """
    if eqn.params["batch_group_count"] > 1:
        return "a gradient taken inside the loss has a convolution"
    count = (num_offsets if whole else num_contractions)(_kernel(eqn), eqn.params)
    if count > _MOST_CONTRACTIONS:
        return f"a convolution with {count} kernel offsets is not mapped over replicas"
    return ""


# -- rewriting --------------------------------------------------------------------------------


def rewrite_convolutions(fn: Callable[..., Any], rule: Rule = split_rightly) -> Callable[..., Any]:
    """The same function of arrays, its convolutions rewritten.

    Args:
      fn: A function of arrays.
      rule: What each convolution becomes.
    """

    def rewritten(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = _evaluate(closed, jax.tree.leaves(args), rule)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return rewritten


def _evaluate(closed: jex.ClosedJaxpr, args: Sequence[Any], rule: Rule) -> list[Any]:
    env = start(closed, args)
    wanted = lambda eqn: is_convolution(eqn) and rule(eqn) is not None
    for eqn in closed.jaxpr.eqns:
        ins = [read(env, a) for a in eqn.invars]
        inside = bodies(eqn)
        new = rule(eqn) if is_convolution(eqn) else None
        if new is not None:
            outs = [new(*ins)]
        elif inside and contains(eqn, wanted):
            outs = reopen(eqn, ins, [lambda *args, b=b: _evaluate(b, args, rule) for b in inside])
        else:
            outs = bind(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(env, a) for a in closed.jaxpr.outvars]


def _contracted(eqn: jex.JaxprEqn) -> Rewritten:
    return lambda lhs, rhs: contracted_convolution(lhs, rhs, eqn.params)


def _with_own_gradient(eqn: jex.JaxprEqn) -> Rewritten:
    plain = lambda lhs, rhs: bind(eqn, [lhs, rhs])[0]
    conv = jax.custom_vjp(plain)

    def backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> Any:
        lhs, rhs = saved
        (input_grad,) = jax.vjp(lambda x: plain(x, rhs), lhs)[1](grad)
        return input_grad, kernel_gradient(lhs, grad, rhs.shape, rhs.dtype, eqn.params)

    conv.defvjp(lambda lhs, rhs: (plain(lhs, rhs), (lhs, rhs)), backward)
    return conv


def _gathers_the_batch(eqn: jex.JaxprEqn) -> bool:
    """The partitioner gathers the batch of grouped convolutions, unless they are depthwise."""
    depthwise = _kernel(eqn)[eqn.params["dimension_numbers"].rhs_spec[1]] == 1
    return not depthwise and num_offsets(_kernel(eqn), eqn.params) <= _MOST_CONTRACTIONS


def _kernel(eqn: jex.JaxprEqn) -> tuple[int, ...]:
    kernel: Any = eqn.invars[1].aval
    return kernel.shape
