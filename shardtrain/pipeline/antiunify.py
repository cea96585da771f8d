"""Compare the repeated pieces of a program: same computation, different operands.

Anti-unification finds the most specific common form of several terms. Here the terms are lists of
equations: every operand that comes from outside a piece becomes a *slot*, with one operand per
piece.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex
import numpy as np

from shardtrain.pipeline.jaxprs import is_literal


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why two pieces are not the same computation, as a phrase that follows "block i"."""

    reason: str


@dataclasses.dataclass
class Template:
    """The common form of `len(maps)` pieces.

    Attributes:
        eqns: the equations, over variables of piece 0.
        slots: stand-in variable -> the operand of each piece.
        maps: per piece, its own variable -> the template's.
    """

    eqns: list[jex.JaxprEqn]
    slots: dict[jex.Var, tuple[Any, ...]]
    maps: list[dict[jex.Var, jex.Var]]


def anti_unify(pieces: Sequence[Sequence[jex.JaxprEqn]]) -> Template | tuple[int, Mismatch]:
    """The template of several lists of equations, or (piece, why it differs from piece 0)."""
    first = pieces[0]
    maps = []
    for index, piece in enumerate(pieces):
        difference = _compare(first, piece)
        if difference:
            return index, difference
        pairs = zip(piece, first, strict=True)
        maps.append(
            {a: b for eqn, base in pairs for a, b in zip(eqn.outvars, base.outvars, strict=True)}
        )
    slots: dict[tuple[Any, ...], tuple[jex.Var, tuple[Any, ...]]] = {}
    eqns = []
    for column in zip(*pieces, strict=True):
        ins = [
            _operand([eqn.invars[n] for eqn in column], maps, slots)
            for n in range(len(column[0].invars))
        ]
        if any(isinstance(operand, Mismatch) for operand in ins):
            found = next(operand for operand in ins if isinstance(operand, Mismatch))
            return 1, Mismatch(f"{found.reason} at {column[0].primitive.name}")
        eqns.append(column[0].replace(invars=ins))
    return Template(eqns, dict(slots.values()), maps)


def _operand(atoms: list[Any], maps: list[dict], slots: dict) -> Any:
    """The template's operand for one operand of every piece."""
    inner = [None if is_literal(a) else m.get(a) for a, m in zip(atoms, maps, strict=True)]
    if inner[0] is not None and all(v is inner[0] for v in inner):
        return inner[0]
    if any(v is not None for v in inner):
        return Mismatch("wires its own results differently from block 0")
    if all(is_literal(a) and same_value(a.val, atoms[0].val) for a in atoms):
        return atoms[0]
    key = tuple(_identity(a) for a in atoms)
    if key not in slots:
        slots[key] = (jex.Var(atoms[0].aval), tuple(atoms))
    return slots[key][0]


def _identity(atom: Any) -> Any:
    if not is_literal(atom):
        return atom
    return ("literal", str(atom.aval), np.asarray(atom.val).tobytes())


def _compare(first: Sequence[jex.JaxprEqn], other: Sequence[jex.JaxprEqn]) -> Mismatch | None:
    for n, (a, b) in enumerate(zip(first, other, strict=False)):
        reason = _difference(a, b)
        if reason:
            return Mismatch(f"differs from block 0 at operation {n} of {len(first)}: {reason}")
    if len(first) != len(other):
        return Mismatch(f"has {len(other)} operations where block 0 has {len(first)}")
    return None


def _difference(a: jex.JaxprEqn, b: jex.JaxprEqn) -> str | None:
    if a.primitive is not b.primitive:
        return f"{b.primitive.name} instead of {a.primitive.name}"
    for what, xs, ys in (("operands", a.invars, b.invars), ("results", a.outvars, b.outvars)):
        if [_type(x) for x in xs] != [_type(y) for y in ys]:
            shown = [", ".join(v.aval.str_short() for v in side) for side in (ys, xs)]
            return f"{a.primitive.name} with {what} ({shown[0]}) instead of ({shown[1]})"
    for key in a.params:
        if not same_param(a.params[key], b.params.get(key)):
            return f"{a.primitive.name} with another {key!r}"
    return None


def _type(atom: Any) -> tuple[Any, Any]:
    return getattr(atom.aval, "shape", None), getattr(atom.aval, "dtype", None)


def same_value(a: Any, b: Any) -> bool:
    """Whether two literals or constants are equal, bit for bit."""
    if a is b:
        return True
    if not hasattr(a, "dtype") and not hasattr(b, "dtype"):
        return type(a) is type(b) and (a == b or a != a)
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def same_param(a: Any, b: Any) -> bool:
    """Whether two equation parameters mean the same.

    Callables (custom derivative rules) cannot be compared and count as equal: the functions they
    come with are compared as jaxprs.
    """
    if a is b:
        return True
    if isinstance(a, jex.ClosedJaxpr) and isinstance(b, jex.ClosedJaxpr):
        consts = zip(a.consts, b.consts, strict=False)
        same = len(a.consts) == len(b.consts) and all(same_value(x, y) for x, y in consts)
        # jax 0.12 has one class for both: `.jaxpr` of a jaxpr is itself.
        return same and _same_jaxpr(a.jaxpr, b.jaxpr)
    if isinstance(a, jex.Jaxpr) and isinstance(b, jex.Jaxpr):
        return _same_jaxpr(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same_param, a, b))
    if _is_function(a) and _is_function(b):
        return True
    if hasattr(a, "dtype") and hasattr(a, "shape") and not isinstance(a, type):
        return hasattr(b, "dtype") and same_value(a, b)
    return type(a) is type(b) and bool(a == b)


def _is_function(x: Any) -> bool:
    return callable(x) or hasattr(x, "call_wrapped")


def _same_jaxpr(a: jex.Jaxpr, b: jex.Jaxpr) -> bool:
    if len(a.eqns) != len(b.eqns) or len(a.invars) != len(b.invars):
        return False
    names = dict(zip((*b.constvars, *b.invars), (*a.constvars, *a.invars), strict=False))

    def same(x: Any, y: Any) -> bool:
        if is_literal(x) or is_literal(y):
            return is_literal(x) and is_literal(y) and same_value(x.val, y.val)
        return names.get(y) is x

    for x, y in zip(a.eqns, b.eqns, strict=True):
        if _difference(x, y) or not all(map(same, x.invars, y.invars)):
            return False
        names.update(zip(y.outvars, x.outvars, strict=True))
    return len(a.outvars) == len(b.outvars) and all(map(same, a.outvars, b.outvars))
