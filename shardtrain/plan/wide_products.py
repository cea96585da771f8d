"""Which matmuls of a bfloat16 plan still read float32, and where."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from shardtrain.partitioning.infer.source import source_line
from shardtrain.plan.layout import Layout
from shardtrain.train import LossFn

_WORTH_SAYING = 0.05  # share of all products' FLOPs


def wide_products(loss: LossFn, layout: Layout) -> tuple[str, ...]:
    """A finding, if matmuls of some weight read float32 although the plan computes in bfloat16.

    Args:
      loss: `(params, variables, batch, key) -> (sums, new variables)`.
      layout: Shapes of its arguments.
    """
    state = layout.state
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    arguments = plain((state.params, state.variables, layout.batch, state.rng))
    found = list(_products(jax.make_jaxpr(loss)(*arguments).jaxpr, "<unknown>", 1))
    total = sum(flops for flops, _, _ in found)
    wide = [(flops, line) for flops, line, is_wide in found if is_wide]
    share = sum(flops for flops, _ in wide) / max(total, 1)
    if share < _WORTH_SAYING:
        return ()
    _, line = max(wide)
    return (
        f"precision=bf16: {share:.0%} of the matmuls' FLOPs read float32, most at {line}: an array "
        "that meets the activations there is float32 by the model's own code; make it bfloat16",
    )


def _products(jaxpr: Any, outer: str, times: int) -> Iterator[tuple[int, str, bool]]:
    for eqn in jaxpr.eqns:
        line = source_line(eqn, outer)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            left, right = (a.aval for a in eqn.invars)
            yield times * _flops(eqn), line, jnp.float32 in (left.dtype, right.dtype)
        length = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from _products(sub, line, times * length)


def _flops(eqn: jex.JaxprEqn) -> int:
    out: Any = eqn.outvars[0].aval
    right: Any = eqn.invars[1].aval
    if eqn.primitive.name == "dot_general":
        (_, contracted), _ = eqn.params["dimension_numbers"]
        return 2 * out.size * math.prod(right.shape[d] for d in contracted)
    numbers = eqn.params["dimension_numbers"].rhs_spec
    return 2 * out.size * right.size // right.shape[numbers[0]]
