"""Interprets a jaxpr over dims: control flow, calls, and the bookkeeping of partial sums."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Literal

from shardtrain.compat import scan_counts
from shardtrain.partitioning.infer.dim_graph import DimGraph, Dims, Opaque, Partial, Site, nbytes
from shardtrain.partitioning.infer.primitive_names import CALLS, body_of
from shardtrain.partitioning.infer.primitives_contract import CONTRACT_RULES
from shardtrain.partitioning.infer.primitives_shape import SHAPE_RULES

_EACH_STEP = "it would be all-reduced in every step of a recurrence"
RULES = SHAPE_RULES | CONTRACT_RULES
_KEEP_PARTIAL = frozenset(
    {"convert_element_type", "reshape", "transpose", "squeeze", "neg", "copy", "copy_p", "name"}
)
_MERGE = frozenset({"add", "add_any", "sub"})


@dataclass(frozen=True)
class Traced:
    """An abstract value: its dims, whether it depends on the batch, its pending partial sum."""

    dims: Dims
    data: bool
    partial: Partial | None = None


class Walk:
    """One pass over a program, filling a `DimGraph`."""

    def __init__(self, graph: DimGraph, inputs: Sequence[Dims] = ()) -> None:
        self.graph = graph
        self.inputs = inputs
        self.looped: set[int] = set()  # atoms of weights that loops have used

    def run(self, jaxpr: Any, ins: list[Traced], outer: str, times: float) -> list[Traced]:
        """Interpret a (closed) jaxpr.

        Args:
          jaxpr: the program.
          ins: one value per input.
          outer: source line of the enclosing equation.
          times: how often the program runs.

        Returns:
          One value per output.
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env = dict(zip(jaxpr.invars, ins, strict=True))
        for var in jaxpr.constvars:
            env[var] = Traced(self._fresh(var.aval), False)
        uses = Counter(v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal))
        uses.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
        for eqn in jaxpr.eqns:
            args = [self._read(v, env, uses) for v in eqn.invars]
            outs = self._equation(eqn, args, outer, times)
            for var, value in zip(eqn.outvars, outs, strict=True):
                env[var] = value
                self.graph.arrays.append((value.dims, nbytes(var.aval) * times))
        return [self._read(v, env, uses) for v in jaxpr.outvars]

    def _fresh(self, aval: Any) -> Dims:
        return [self.graph.atoms.fresh(s) for s in getattr(aval, "shape", ())]

    def _read(self, var: Any, env: dict, uses: Counter) -> Traced:
        if isinstance(var, Literal):
            return Traced(self._fresh(var.aval), False)
        value = env[var]
        if value.partial is not None and uses[var] > 1:
            return Traced(value.dims, value.data)
        return value

    def _equation(self, eqn: Any, args: list[Traced], outer: str, times: float) -> list[Traced]:
        name = eqn.primitive.name
        data = any(a.data for a in args)
        site = Site(self.graph, eqn, outer, times, tuple(a.data for a in args))
        if name in CALLS:
            body = eqn.params[body_of(eqn.params)]
            return self.run(body, args, site.source, times)
        if name == "scan":
            return self._scan(site, args)
        if name == "while":
            return self._while(site, args)
        if name == "cond":
            return self._cond(site, args)
        rule = RULES.get(name)
        if rule is None:
            return self._opaque(site, args)
        dims = rule(site, [a.dims for a in args])
        partial = site.partial or _merged(name, args, site)
        return [Traced(d, data, partial) for d in dims]

    def _opaque(self, site: Site, args: list[Traced]) -> list[Traced]:
        name = site.eqn.primitive.name
        if any(a.dims for a in args):
            self.graph.opaque.append(Opaque(name, site.source))
        for i, a in enumerate(args):
            for dim in a.dims:
                site.need_whole(dim, site.in_bytes(i), f"unknown primitive `{name}`")
        data = any(a.data for a in args)
        return [Traced(self._fresh(v.aval), data) for v in site.eqn.outvars]

    def _scan(self, site: Site, args: list[Traced]) -> list[Traced]:
        p = site.params
        first, last = itertools.accumulate(scan_counts(p))
        carry, xs = args[first:last], args[last:]
        length = self.graph.atoms.fresh(p["length"])
        for x in xs:
            site.unify(x.dims[0], length)
        if xs and xs[0].dims[0]:
            length = xs[0].dims[0]
        site.block(length, "the length of a scan")
        self.graph.scanned.append(length)
        data = any(a.data for a in args)
        inner = [Traced(c.dims, c.data or data) for c in carry]
        inner += [Traced(x.dims[1:], x.data) for x in xs]
        before = len(self.graph.partials)
        outs = self.run(
            p["jaxpr"], [*args[:first], *inner], site.source, site.times * max(1, p["length"])
        )
        self._tie(site, carry, outs)
        if self._is_recurrent(args[:first], carry, xs):
            for partial in self.graph.partials[before:]:
                site.block([a for t in partial.terms for a in t], _EACH_STEP)
        ys = [Traced([length, *y.dims], y.data) for y in outs[len(carry) :]]
        return [*(Traced(c.dims, data) for c in carry), *ys]

    def _is_recurrent(self, consts: list[Traced], carry: list[Traced], xs: list[Traced]) -> bool:
        """A loop over data that carries examples through the same weights, as an RNN over time.

        The backward loop of a block that is merely applied several times also runs over data; it
        is told by its weights, which an earlier loop has used.
        """
        roots = self.graph.atoms.roots
        weights = {a for c in consts if not c.data and len(c.dims) > 1 for d in c.dims for a in d}
        new, self.looped = weights - self.looped, self.looped | weights
        carried = {r for c in carry for d in c.dims for r in roots(d)}
        batch = {r for d in self.inputs for r in roots(d[0])}
        over_data = any(x.data for x in xs) and all(x.data for x in xs if len(x.dims) > 1)
        return bool(new) and over_data and bool(batch & carried)

    def _tie(self, site: Site, before: list[Traced], after: list[Traced]) -> None:
        """What comes around a loop has the dims of what went in."""
        for b, a in zip(before, after, strict=False):
            for one, two in zip(b.dims, a.dims, strict=True):
                site.unify(one, two)

    def _while(self, site: Site, args: list[Traced]) -> list[Traced]:
        p = site.params
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        carry, data = args[m:], any(a.data for a in args)
        inner = [Traced(c.dims, data) for c in carry]
        self.run(p["cond_jaxpr"], [*args[:n], *inner], site.source, site.times)
        outs = self.run(p["body_jaxpr"], [*args[n:m], *inner], site.source, site.times)
        self._tie(site, carry, outs)
        return inner

    def _cond(self, site: Site, args: list[Traced]) -> list[Traced]:
        branches = site.params["branches"]
        share = site.times / len(branches)
        results = [self.run(b, args[1:], site.source, share) for b in branches]
        for other in results[1:]:
            self._tie(site, results[0], other)
        data = any(a.data for a in args)
        return [Traced(v.dims, data) for v in results[0]]


def _merged(name: str, args: list[Traced], site: Site) -> Partial | None:
    """Pass a partial sum through linear single uses; join the terms of a sum of partial sums."""
    if name in _KEEP_PARTIAL:
        return args[0].partial
    pending = [a.partial for a in args]
    if name == "mul" and len(pending) == 2 and not all(pending):
        other = args[0] if pending[1] else args[1]
        return (pending[0] or pending[1]) if not any(other.dims) else None
    one, two = [*pending, None, None][:2]
    if name not in _MERGE or one is None or two is None or one is two:
        return None
    one.merged = two.merged = True
    both = Partial([*one.terms, *two.terms], site.out_bytes(), site.eqn, site.outer)
    site.graph.partials.append(both)
    return both
