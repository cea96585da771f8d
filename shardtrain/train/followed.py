"""Which values of a traced gradient `widen` keeps in float32: those that move or add gradients."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

from shardtrain.compat import scan_counts
from shardtrain.replay import bodies, closed

MOVES = frozenset(
    (
        *("add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p"),
        *("dynamic_update_slice", "expand_dims", "mul", "neg", "optimization_barrier", "pad"),
        *("reshape", "rev", "sharding_constraint", "slice", "squeeze", "transpose"),
    )
)
Vars = set[jex.Var]


def followed_values(program: jex.ClosedJaxpr, chosen: Sequence[bool]) -> Vars:
    """The values on the way to the chosen outputs that are to be float32."""
    found: Vars = set()
    for atom, choose in zip(program.jaxpr.outvars, chosen, strict=True):
        if choose and isinstance(atom, jex.Var):
            found.add(atom)
    for eqn in reversed(program.jaxpr.eqns):
        outs = [v in found for v in eqn.outvars]
        if any(outs):
            sources = _sources(eqn, outs)
            found.update(v for v in sources if isinstance(v, jex.Var) and is_floating(v))
    return found


def _sources(eqn: jex.JaxprEqn, outs: Sequence[bool]) -> list[Any]:
    """Operands that must be float32 for these outputs to be."""
    name = eqn.primitive.name
    if name in MOVES or _drops_ones(eqn):
        kept = eqn.invars
        return [a for a, o in zip(kept, outs, strict=True) if o] if len(outs) > 1 else list(kept)
    inside = bodies(eqn)
    if not inside:
        return []
    skip = 1 if name == "cond" else 0
    chosen = scan_chosen(eqn, outs) if name == "scan" else outs
    followed = [followed_values(body, chosen) for body in inside]
    picked = []
    for body, vars_ in zip(inside, followed, strict=True):
        inner = body.jaxpr.invars
        picked += [a for a, v in zip(eqn.invars[skip:], inner, strict=True) if v in vars_]
    return picked + _carried_in(eqn, chosen)


def _drops_ones(eqn: jex.JaxprEqn) -> bool:
    """A sum over dims of size 1, as broadcasting leaves behind."""
    if eqn.primitive.name != "reduce_sum":
        return False
    before, after = (getattr(a.aval, "size", 0) for a in _both(eqn))
    return before == after


def scan_chosen(eqn: jex.JaxprEqn, outs: Sequence[bool]) -> list[bool]:
    """Outputs of the loop body to widen: a sum that is carried stays wide all the way round."""
    first, carried = scan_counts(eqn.params)
    body, chosen = closed(eqn.params["jaxpr"]), list(outs)
    while True:
        followed = followed_values(body, chosen)
        entering = [v in followed for v in body.jaxpr.invars[first : first + carried]]
        both = [a or b for a, b in zip(chosen, entering, strict=False)] + chosen[carried:]
        if both == chosen:
            return chosen
        chosen = both


def _carried_in(eqn: jex.JaxprEqn, chosen: Sequence[bool]) -> list[Any]:
    if eqn.primitive.name != "scan":
        return []
    first, carried = scan_counts(eqn.params)
    entering = eqn.invars[first : first + carried]
    return [a for a, c in zip(entering, chosen, strict=False) if c]


def is_cast(eqn: jex.JaxprEqn) -> bool:
    """From one floating-point dtype to another, float32 at most."""
    cast = eqn.primitive.name == "convert_element_type"
    return cast and all(is_floating(a) and a.aval.dtype.itemsize <= 4 for a in _both(eqn))


def _both(eqn: jex.JaxprEqn) -> list[Any]:
    return [eqn.invars[0], eqn.outvars[0]]


def is_floating(atom: Any) -> bool:
    """Whether an operand is a floating-point array."""
    return jnp.issubdtype(getattr(atom.aval, "dtype", jnp.int32), jnp.floating)


def is_narrow(atom: Any) -> bool:
    """Whether it is one of fewer than 32 bits."""
    return is_floating(atom) and atom.aval.dtype.itemsize < 4
