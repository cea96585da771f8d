"""A traced function as a flat list of equations that can be cut and put together again.

Built on `jax.extend.core` (JAX's public door to jaxprs). Calls of `jit` are inlined, so that
equations inside and outside helper functions look alike.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.errors import StageSplitError

MARK = "shardtrain:"  # prefix of the names that `markers` leaves in a trace


@dataclasses.dataclass
class Mark:
    """Where one named marker stands in a program, and the values it was put on."""

    name: str
    position: int
    atoms: list[Any]


@dataclasses.dataclass
class Program:
    """A flat program: no `jit` calls, every variable defined once, markers taken out."""

    invars: list[jex.Var]
    outvars: list[Any]
    eqns: list[jex.JaxprEqn]
    consts: dict[jex.Var, Any]
    marks: list[Mark]
    remat: dict[str, dict[str, Any]]  # marker name -> parameters of the remat around it
    inline_remat: bool = False


def flatten(closed: jex.ClosedJaxpr, inline_remat: bool = False) -> Program:
    """Inline `jit` calls (and `remat` around markers, or all) and rename all variables apart."""
    program = Program([], [], [], {}, [], {}, inline_remat)
    program.invars = [jex.Var(v.aval) for v in closed.jaxpr.invars]
    program.outvars = _inline(program, closed, list(program.invars), None)
    return program


def _inline(
    program: Program, closed: jex.ClosedJaxpr, args: list[Any], remat: dict[str, Any] | None
) -> list[Any]:
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        env[var] = jex.Var(var.aval)
        program.consts[env[var]] = value
    read = lambda atom: atom if is_literal(atom) else env[atom]
    for eqn in jaxpr.eqns:
        ins, name = [read(a) for a in eqn.invars], eqn.primitive.name
        if name == "name" and eqn.params["name"].startswith(MARK):
            _note(program, eqn.params["name"], ins[0], remat)
            outs = ins
        elif _inlineable(eqn):
            outs = _inline(program, eqn.params["jaxpr"], ins, remat)
        elif "prevent_cse" in eqn.params and (
            program.inline_remat or _has_marks(eqn.params["jaxpr"])
        ):
            inner = eqn.params["jaxpr"]
            inner = inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, ())
            keep = {k: eqn.params[k] for k in ("policy", "prevent_cse")}
            outs = _inline(program, inner, ins, keep)
        else:
            outs = [jex.Var(v.aval) for v in eqn.outvars]
            program.eqns.append(eqn.replace(invars=ins, outvars=outs))
            outs = _forwarded(eqn, ins, outs)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _forwarded(eqn: jex.JaxprEqn, ins: list[Any], outs: list[Any]) -> list[Any]:
    """Results of a remat that are its inputs (rng keys it hands back): the inputs themselves."""
    if "prevent_cse" not in eqn.params:
        return outs
    jaxpr = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    given = dict(zip(jaxpr.invars, ins, strict=True))
    return [
        out if is_literal(inner) else given.get(inner, out)
        for inner, out in zip(jaxpr.outvars, outs, strict=True)
    ]


def _note(program: Program, name: str, atom: Any, remat: dict[str, Any] | None) -> None:
    last = program.marks[-1] if program.marks else None
    if last and last.name == name and last.position == len(program.eqns):
        last.atoms.append(atom)
    else:
        program.marks.append(Mark(name, len(program.eqns), [atom]))
    if remat is not None:
        program.remat[name] = remat


def _inlineable(eqn: jex.JaxprEqn) -> bool:
    """A `jit` call without shardings of its own."""
    if eqn.primitive is not jex.primitives.jit_p:
        return False
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return not any(isinstance(s, jax.sharding.Sharding) for s in shardings)


def _has_marks(jaxpr: Any) -> bool:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        (eqn.primitive.name == "name" and eqn.params["name"].startswith(MARK))
        or any(_has_marks(sub) for sub in jex.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def is_literal(atom: Any) -> bool:
    """Whether an operand is a literal rather than a variable."""
    return isinstance(atom, jex.Literal)


def type_of(atom: Any) -> Any:
    """Abstract value of an operand: `.shape`, `.dtype`, `.size`, `.str_short()`."""
    return atom.aval


def variables(atoms: Iterable[Any]) -> list[jex.Var]:
    """The operands that are variables."""
    return [atom for atom in atoms if not is_literal(atom)]


def backward_slice(
    eqns: Sequence[jex.JaxprEqn], outputs: Iterable[Any], known: Iterable[jex.Var] = ()
) -> list[jex.JaxprEqn]:
    """The equations that `outputs` need, in order, when `known` are already there."""
    given, needed, kept = set(known), set(variables(outputs)), []
    needed -= given
    for eqn in reversed(eqns):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in variables(eqn.invars) if v not in given)
    return kept[::-1]


def depends(eqns: Sequence[jex.JaxprEqn], seeds: Iterable[jex.Var]) -> set[jex.Var]:
    """All variables computed from `seeds`, the seeds included."""
    found = set(seeds)
    for eqn in eqns:
        if found.intersection(variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def casts(eqns: Sequence[jex.JaxprEqn], sources: Iterable[jex.Var]) -> dict[jex.Var, jex.Var]:
    """Values that are one of `sources` in another dtype: cast value -> source."""
    found, known = {}, set(sources)
    for eqn in eqns:
        if eqn.primitive.name == "convert_element_type" and not is_literal(eqn.invars[0]):
            source = found.get(eqn.invars[0], eqn.invars[0])
            if source in known:
                found[eqn.outvars[0]] = source
    return found


def build(
    eqns: Sequence[jex.JaxprEqn],
    inputs: Sequence[jex.Var],
    outputs: Sequence[Any],
    consts: dict[jex.Var, Any],
) -> Callable[..., list[Any]]:
    """A function of `inputs` (positional arrays) that computes `outputs` and nothing else.

    Raises:
        StageSplitError: the outputs need a value that is not among the inputs.
    """
    kept = backward_slice(eqns, outputs, inputs)
    used = {v for eqn in kept for v in variables(eqn.invars)} | set(variables(outputs))
    held = [v for v in consts if v in used]
    loose = used - {v for eqn in kept for v in eqn.outvars} - {*inputs, *held}
    if loose:
        shown = ", ".join(sorted(v.aval.str_short() for v in loose))
        raise StageSplitError(f"it needs values that other blocks compute ({shown})")
    effects = frozenset().union(*(eqn.effects for eqn in kept)) if kept else frozenset()
    names = tuple("" for _ in inputs), tuple("" for _ in outputs)
    debug = jex.DebugInfo("pipeline", "pipeline piece", *names)
    jaxpr = jex.Jaxpr(held, list(inputs), list(outputs), kept, effects, debug)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, [consts[v] for v in held]))
