"""A stage's backward cut in two: input gradient now (slot B), weight gradient later (slot W).

The stage and its `jax.vjp` are traced for a single stage; the flat program is cut by data flow:

| part | equations | slot |
|---|---|---|
| `forward` | needed for the input gradient, independent of the arriving gradient | B |
| `inputs` | needed for the input gradient, dependent on it | B |
| `weights` | needed for the weight gradient only | W |

What `weights` reads of the others, besides the parameters, is the *residual* B stores for W.
Nothing is computed twice.

Source of the idea: zero bubble pipeline parallelism, arXiv:2401.10241.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from shardtrain.pipeline.jaxprs import backward_slice, build, depends, flatten, variables

Flat = Callable[..., list[Any]]


@dataclasses.dataclass(frozen=True)
class SplitBackward:
    """The three parts, for one stage; all take and return flat lists.

    Args:
        forward: (params, others) -> outputs, then `num_kept` values.
        inputs: (params, others, kept, gradients) -> gradients of the others, then residual.
        weights: (params, residual) -> gradients of the parameters.
        num_outputs: number of outputs.
        num_input_grads: number of gradients of others.
        residual: abstract values of the residual.
    """

    forward: Flat
    inputs: Flat
    weights: Flat
    num_outputs: int
    num_input_grads: int
    residual: tuple[Any, ...]


def split_backward(
    stage: Callable[[list, list, list], tuple[list, list]], params: list, smooth: list, fixed: list
) -> SplitBackward:
    """Cut the backward of `stage(params, smooth, fixed) -> (floating, other) outputs`.

    Args:
        stage: one stage; its layers must not be in a scan, which cannot be cut.
        params: abstract parameters: differentiated in W.
        smooth: abstract inputs: differentiated in B.
        fixed: abstract inputs that carry no gradient.
    """
    floats, rest_out = jax.eval_shape(stage, params, smooth, fixed)
    num_outputs = len(floats) + len(rest_out)

    def whole(params: list, smooth: list, fixed: list, grads: list) -> Any:
        y, pull, z = jax.vjp(lambda p, s: stage(p, s, fixed), params, smooth, has_aux=True)
        d_params, d_smooth = pull(grads)
        return y, z, d_smooth, d_params

    program = flatten(jax.make_jaxpr(whole)(params, smooth, fixed, floats), inline_remat=True)
    eqns, consts = program.eqns, program.consts
    sizes = [len(params), len(smooth) + len(fixed), len(floats)]
    own, others, grads = _cut(program.invars, sizes)
    y, d_smooth, d_params = _cut(program.outvars, [num_outputs, len(smooth), len(params)])

    late = depends(eqns, grads)
    urgent = backward_slice(eqns, [*y, *d_smooth])
    now = {id(eqn) for eqn in urgent}
    rest = [eqn for eqn in backward_slice(eqns, d_params) if id(eqn) not in now]
    first = [eqn for eqn in urgent if not late.intersection(eqn.outvars)]
    second = [eqn for eqn in urgent if late.intersection(eqn.outvars)]
    made = {v for eqn in first for v in eqn.outvars}
    reads = lambda part: {v for eqn in part for v in variables(eqn.invars)}
    wanted = reads(rest) | set(variables(d_params))
    inside = {v for eqn in rest for v in eqn.outvars} | set(own) | set(consts)
    # In the order of their making: every process must build the same program.
    order = [*program.invars, *(v for eqn in eqns for v in eqn.outvars)]
    residual = [v for v in order if v in wanted - inside]
    later = reads(second) | set(residual) | set(variables(d_smooth))
    kept = [v for v in order if v in made & later]
    return SplitBackward(
        forward=build(first, [*own, *others], [*y, *kept], consts),
        inputs=build(second, [*own, *others, *kept, *grads], [*d_smooth, *residual], consts),
        weights=build(rest, [*own, *residual], d_params, consts),
        num_outputs=num_outputs,
        num_input_grads=len(smooth),
        residual=tuple(v.aval for v in residual),
    )


def _cut(values: Sequence[Any], sizes: list[int]) -> list[list[Any]]:
    cuts, at = [], 0
    for size in sizes:
        cuts.append(list(values[at : at + size]))
        at += size
    return cuts
