"""Evaluate a traced program again, equation by equation, with some of it done differently.

Built on `jax.extend.core` (JAX's public door to jaxprs).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax

from shardtrain.compat import scan_counts

Function = Callable[..., list[Any]]


def read(env: dict[Any, Any], atom: Any) -> Any:
    """The value of an operand."""
    return atom.val if isinstance(atom, jex.Literal) else env[atom]


def start(closed: jex.ClosedJaxpr, args: Sequence[Any]) -> dict[Any, Any]:
    """The values known before the first equation."""
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    return env | dict(zip(closed.jaxpr.invars, args, strict=True))


def bind(eqn: jex.JaxprEqn, ins: Sequence[Any]) -> list[Any]:
    """One equation as it was traced."""
    inputs: list[Any] = [jex.Var(a.aval) for a in eqn.invars]
    outputs = [jex.Var(v.aval) for v in eqn.outvars]
    alone = eqn.replace(invars=inputs, outvars=outputs)
    debug = jex.DebugInfo("replay", "one equation", ("",) * len(inputs), ("",) * len(outputs))
    jaxpr = jex.Jaxpr((), inputs, outputs, [alone], eqn.effects, debug)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*ins)


def closed(jaxpr: Any) -> jex.ClosedJaxpr:
    """A body as a closed program, however the equation keeps it."""
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def bodies(eqn: jex.JaxprEqn) -> list[jex.ClosedJaxpr]:
    """The programs inside an equation that `reopen` can run again; empty for any other."""
    name = eqn.primitive.name
    if name in _JITS or name in _REMATS or name == "scan":
        return [closed(eqn.params["jaxpr"])]
    return [closed(b) for b in eqn.params["branches"]] if name == "cond" else []


def reopen(eqn: jex.JaxprEqn, ins: Sequence[Any], functions: Sequence[Function]) -> list[Any]:
    """The equation with other bodies: one function for each of `bodies(eqn)`.

    The bodies may take and return other dtypes than they were traced with.
    """
    name, p = eqn.primitive.name, eqn.params
    if name in _JITS:
        return functions[0](*ins)
    if name in _REMATS:
        options = {option: p[option] for option in ("prevent_cse", "policy")}
        return jax.checkpoint(functions[0], **options)(*ins)
    if name == "cond":
        return lax.switch(ins[0], list(functions), *ins[1:])
    first, carried = scan_counts(p)
    last = first + carried

    def step(carry: Any, xs: Any) -> Any:
        out = functions[0](*ins[:first], *carry, *xs)
        return out[:carried], out[carried:]

    options = {option: p[option] for option in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, list(ins[first:last]), list(ins[last:]), **options)
    return [*carry, *ys]


def contains(eqn: jex.JaxprEqn, wanted: Callable[[jex.JaxprEqn], bool]) -> bool:
    """Whether an equation, or one anywhere inside it, is wanted."""
    subs = jex.jaxprs_in_params(eqn.params)
    return wanted(eqn) or any(contains(e, wanted) for sub in subs for e in sub.eqns)


_JITS = frozenset({"jit", "pjit"})
_REMATS = frozenset({"checkpoint", "remat", "remat2"})
