"""A traced function with some operands and results changed: how unmodified models are constrained.

Runs of untouched equations are evaluated as they are; loops, branches, `remat` and nested `jit` are
opened only where an edit lies inside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.replay import bind, bodies, read, reopen, start

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Edit:
    """What to do at one equation.

    Args:
      operands: Operand number -> function applied before. The same function on the same variable
        is applied once per program, so that its gradients are added before it is transposed.
      results: Result number -> function applied after.
    """

    operands: Mapping[int, Change] = field(default_factory=dict)
    results: Mapping[int, Change] = field(default_factory=dict)


Edits = Callable[[jex.JaxprEqn], Edit | None]


def rewrite(fn: Callable[..., Any], find: Callable[[jex.ClosedJaxpr], Edits]) -> Callable[..., Any]:
    """The same function with edited equations.

    Args:
      fn: Any traceable function of pytrees.
      find: Given the traced program, says what to do at each of its equations.

    Example:
      >>> import jax.numpy as jnp
      >>> double = lambda closed: lambda eqn: (
      ...     Edit(results={0: lambda x: 2 * x}) if eqn.primitive.name == "sin" else None
      ... )
      >>> float(rewrite(lambda x: jnp.sin(x) + jnp.cos(x), double)(0.5)) == float(
      ...     2 * jnp.sin(0.5) + jnp.cos(0.5)
      ... )
      True
    """

    def edited(*args: Any) -> Any:
        traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        out = _Edited(find(traced)).run(traced, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return edited


class _Edited:
    """One evaluation of an edited program."""

    def __init__(self, edits: Edits) -> None:
        self.edits = edits
        self.touched: dict[int, bool] = {}

    def run(self, program: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        env = start(program, args)
        done: dict[tuple[Any, Change], Any] = {}
        last = _last_uses(program.jaxpr)
        pending: list[jex.JaxprEqn] = []
        for number, eqn in enumerate(program.jaxpr.eqns):
            if not self._touches(eqn):
                pending.append(eqn)
                continue
            _flush(pending, env, last, number)
            outs = self._equation(eqn, env, done)
            env.update(zip(eqn.outvars, outs, strict=True))
        _flush(pending, env, last, len(program.jaxpr.eqns))
        return [read(env, a) for a in program.jaxpr.outvars]

    def _touches(self, eqn: jex.JaxprEqn) -> bool:
        known = self.touched.get(id(eqn))
        if known is None:
            inside = (e for body in bodies(eqn) for e in body.jaxpr.eqns)
            known = self.edits(eqn) is not None or any(self._touches(e) for e in inside)
            self.touched[id(eqn)] = known
        return known

    def _equation(self, eqn: jex.JaxprEqn, env: dict, done: dict) -> list[Any]:
        edit = self.edits(eqn) or Edit()
        ins = []
        for i, atom in enumerate(eqn.invars):
            change = edit.operands.get(i)
            if change is None or isinstance(atom, jex.Literal):
                ins.append(read(env, atom))
                continue
            if (atom, change) not in done:
                done[atom, change] = _change(eqn, change, env[atom])
            ins.append(done[atom, change])
        inside = bodies(eqn)
        if inside:
            runs = [lambda *args, body=body: self.run(body, args) for body in inside]
            outs = reopen(eqn, ins, runs)
        else:
            outs = bind(eqn, ins)
        changes = edit.results
        return [_change(eqn, changes[i], x) if i in changes else x for i, x in enumerate(outs)]


def _change(eqn: jex.JaxprEqn, change: Change, value: Any) -> Any:
    """Apply a change as if it stood in the model where the equation does (for source lines)."""
    traced = jax.make_jaxpr(change)(value)
    eqns = [e.replace(source_info=eqn.source_info) for e in traced.jaxpr.eqns]
    placed = jex.ClosedJaxpr(traced.jaxpr.replace(eqns=eqns), traced.consts)
    (out,) = jex.jaxpr_as_fun(placed)(value)
    return out


def _last_uses(jaxpr: jex.Jaxpr) -> dict[Any, int]:
    """Variable -> number of the last equation that reads it (past the end: a result)."""
    last: dict[Any, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        last.update((v, number) for v in eqn.invars if not isinstance(v, jex.Literal))
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    return last


def _flush(pending: list[jex.JaxprEqn], env: dict, last: Mapping[Any, int], now: int) -> None:
    """Evaluate a run of untouched equations; keep what is read from equation `now` on."""
    if not pending:
        return
    made = {v for e in pending for v in e.outvars}
    read_here = [v for e in pending for v in e.invars if not isinstance(v, jex.Literal)]
    inputs = list(dict.fromkeys(v for v in read_here if v not in made))
    outputs = [v for e in pending for v in e.outvars if last.get(v, -1) >= now]
    effects = frozenset().union(*(e.effects for e in pending))
    names = ("",) * len(inputs), ("",) * len(outputs)
    debug = jex.DebugInfo("edit", "untouched equations", *names)
    jaxpr = jex.Jaxpr((), inputs, outputs, list(pending), effects, debug)
    outs = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*(env[v] for v in inputs))
    env.update(zip(outputs, outs, strict=True))
    pending.clear()
