"""The backward of one layer, cut by data flow into parts that run at different times.

The layer and its `jax.vjp` are traced; every equation of the flat program goes to one part:

| part | equations | runs |
|---|---|---|
| `once` | that depend on nothing but what all layers share | before the layers |
| `forward` | needed for the input gradient, independent of the arriving gradient | slot B |
| `inputs` | needed for the input gradient, dependent on it | slot B |
| `weights` | needed for the weight gradient only | slot W |

What a part reads of an earlier one is stored: `kept` from `forward` to `inputs`, the *residual* for
`weights`; of both, the fewest bytes from which elementwise functions lead to the rest. No matrix
product, sum or random number is computed twice.

Source of the idea: zero bubble pipeline parallelism, arXiv:2401.10241.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.pipeline.jaxprs import backward_slice, build, depends, flatten, variables
from shardtrain.pipeline.least_storage import is_cheap, least_storage

Flat = Callable[..., list[Any]]


@dataclasses.dataclass(frozen=True)
class LayerCut:
    """The parts of one layer; all take and return flat lists.

    Args:
        once: shared -> values for all layers, then the residual that all layers share.
        forward: params, shared, layered, carry, values of `once` -> carry, then what is kept.
        inputs: params, shared, layered, values of `once`, kept, gradients of the floating carry ->
            gradients of the floating carry, of smooth shared and of smooth layered values, then
            the layer's own residual.
        weights: params, shared residual, the layer's own -> gradients of the params.
        num_once: how many values `once` makes for all layers.
        common, own: abstract values of the two residuals.
    """

    once: Flat
    forward: Flat
    inputs: Flat
    weights: Flat
    num_once: int
    common: tuple[Any, ...]
    own: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A layer with its gradient as a flat program, inputs and outputs by role."""

    eqns: list[jex.JaxprEqn]
    consts: dict[jex.Var, Any]
    params: list[Any]
    shared: list[Any]
    layered: list[Any]
    carry: list[Any]
    grads: list[Any]
    y: list[Any]
    d_inputs: list[Any]
    d_params: list[Any]

    @property
    def order(self) -> list[Any]:
        """All values, as they are made: every process must build the same program."""
        made = [v for eqn in self.eqns for v in eqn.outvars]
        return [*self.shared, *self.layered, *self.carry, *self.grads, *made]


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which equations compute what, and what is known where.

    Args:
        used: all equations but dead ones.
        first, second, third: those of `forward`, `inputs` and `weights`.
        varying: values that differ from layer to layer.
        late: values that depend on the arriving gradient.
        anywhere: values that every part has or makes from nothing.
    """

    used: list[jex.JaxprEqn]
    first: list[jex.JaxprEqn]
    second: list[jex.JaxprEqn]
    third: list[jex.JaxprEqn]
    varying: set[Any]
    late: set[Any]
    anywhere: set[Any]


def cut_layer(
    gradient: Callable[..., tuple[list, list, list]], args: Sequence[list], num_layers: int
) -> LayerCut:
    """Cut a layer's gradient into its parts.

    Args:
        gradient: (params, shared, layered, carry, gradients) -> outputs, gradients of all inputs
            that have one, gradients of the params.
        args: abstract arguments, of one layer.
        num_layers: layers of a stage: what differs between them is stored that often.
    """
    program = flatten(jax.make_jaxpr(gradient)(*args), inline_remat=True)
    outs = jax.eval_shape(gradient, *args)
    traced = Traced(
        program.eqns,
        program.consts,
        *split_sizes(program.invars, args),
        *split_sizes(program.outvars, outs),
    )
    return _parts(traced, _slots(traced), num_layers)


def split_sizes(values: Sequence[Any], like: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Cut a flat list into lists as long as those of `like`."""
    rest = iter(values)
    return [[next(rest) for _ in each] for each in like]


def _slots(t: Traced) -> Slots:
    late = depends(t.eqns, t.grads)
    varying = depends(t.eqns, [*t.params, *t.layered, *t.carry]) | late
    reached = depends(t.eqns, t.shared) | varying
    used = backward_slice(t.eqns, [*t.y, *t.d_inputs, *t.d_params])
    now = {id(eqn) for eqn in backward_slice(t.eqns, [*t.y, *t.d_inputs])}
    apart = [e for e in used if varying.intersection(e.outvars)]
    return Slots(
        used,
        first=[e for e in apart if id(e) in now and not late.intersection(e.outvars)],
        second=[e for e in apart if id(e) in now and late.intersection(e.outvars)],
        third=[e for e in apart if id(e) not in now],
        varying=varying,
        late=late,
        anywhere={*t.params, *t.consts, *(v for e in used for v in e.outvars if v not in reached)},
    )


def _parts(t: Traced, s: Slots, num_layers: int) -> LayerCut:
    steady = {v for v in t.order if v not in s.varying}
    copies = lambda v: num_layers if v in s.varying else 1
    nbytes = lambda v: copies(v) * v.aval.size * v.aval.dtype.itemsize

    def store(wanted: Iterable[Any], available: set[Any]) -> list[Any]:
        asked = set(wanted)
        found = least_storage(s.used, available, [v for v in t.order if v in asked], nbytes)
        return [v for v in t.order if v in found]

    residual = store(_reads(s.third, t.d_params), s.anywhere)
    early = [v for v in [*_reads(s.second, t.d_inputs), *residual] if v not in s.late]
    kept = store(early, {*s.anywhere, *t.layered, *steady})
    apart = [*s.first, *s.second, *s.third]
    once = store(steady & _reads(apart, [*t.y, *t.d_inputs]), {*s.anywhere, *t.shared})
    common = [v for v in residual if v in steady]
    own = [v for v in residual if v not in steady]
    begun = [*t.params, *t.shared, *t.layered]
    part = lambda eqns, inputs, outputs: _part(t, s, eqns, inputs, outputs)
    return LayerCut(
        once=build(s.used, t.shared, [*once, *common], t.consts),
        forward=part(s.first, [*begun, *t.carry, *once], [*t.y, *kept]),
        inputs=part(s.second, [*begun, *once, *kept, *t.grads], [*t.d_inputs, *own]),
        weights=part(s.third, [*t.params, *common, *own], t.d_params),
        num_once=len(once),
        common=tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in common),
        own=tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in own),
    )


def _reads(part: Sequence[jex.JaxprEqn], outputs: Sequence[Any]) -> set[Any]:
    """What a part needs that it does not make."""
    wanted = {v for eqn in part for v in variables(eqn.invars)} | set(variables(outputs))
    return wanted - {v for eqn in part for v in eqn.outvars}


def _part(
    t: Traced, s: Slots, own: Sequence[jex.JaxprEqn], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Flat:
    """A part's own equations, and the cheap ones that lead to what it reads."""
    mine = {id(eqn) for eqn in own}
    free = lambda eqn: s.anywhere.issuperset(eqn.outvars)
    eqns = [e for e in s.used if id(e) in mine or is_cheap(e) or free(e)]
    return build(eqns, inputs, outputs, t.consts)
