"""Walks two traces of one function side by side for `batch_independence`."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend.core import Literal

from shardtrain.compat import scan_counts
from shardtrain.partitioning.infer.batch_compare import changed_params, constant, number
from shardtrain.partitioning.infer.batch_contract import CONTRACT_RULES, gather
from shardtrain.partitioning.infer.batch_rules import POSITION_RULES, RULES
from shardtrain.partitioning.infer.batch_value import (
    SAME,
    Kind,
    Op,
    Value,
    examples,
    join,
    mixed,
    scaled_dims,
)
from shardtrain.partitioning.infer.primitive_names import CALLS, body_of
from shardtrain.partitioning.infer.source import is_trusted_rule, source_line

_ALL_RULES = RULES | CONTRACT_RULES
_POSITION_RULES = POSITION_RULES | {gather}
_ZERO_RULES = frozenset(  # the rules that know when zeros stay zeros
    RULES[name]
    for name in ("add", "broadcast_in_dim", "reshape", "transpose", "squeeze", "concatenate")
)


@dataclass
class Walk:
    """The state of one comparison: batch sizes of the two traces and what was met."""

    sizes: tuple[int, int]
    ignore_random: bool = False
    untrusted: str = ""  # the first custom derivative that user code defines
    memo: dict[Any, list[Value]] = field(default_factory=dict)

    def call(self, pair: tuple[Any, Any], ins: list[Value], outer: str = "") -> list[Value]:
        """Abstract outputs of a pair of (closed) jaxprs; equal calls are evaluated once."""
        key = (id(pair[0]), id(pair[1]), tuple(ins), outer)
        if key not in self.memo:
            self.memo[key] = self._run(pair, ins, outer)
        return self.memo[key]

    def _run(self, pair: tuple[Any, Any], ins: list[Value], outer: str) -> list[Value]:
        one, two = (getattr(j, "jaxpr", j) for j in pair)
        consts = zip(*(getattr(j, "consts", ()) for j in pair), strict=False)
        if len(one.eqns) != len(two.eqns) or len(one.constvars) != len(two.constvars):
            reason = "the program itself changes with the batch size (Python code that looks at it)"
            return [mixed(reason)] * len(one.outvars)
        env = dict(zip(one.invars, ins, strict=True))
        env |= {v: constant(c, self.sizes) for v, c in zip(one.constvars, consts, strict=True)}
        twin = dict(zip((*one.invars, *one.constvars), (*two.invars, *two.constvars), strict=True))
        for eqns in zip(one.eqns, two.eqns, strict=True):
            outs = self._equation(eqns, env, twin, outer)
            env.update(zip(eqns[0].outvars, outs, strict=True))
            twin.update(zip(eqns[0].outvars, eqns[1].outvars, strict=True))
        return [
            self._read(atoms, env, twin) for atoms in zip(one.outvars, two.outvars, strict=True)
        ]

    def _read(self, atoms: tuple[Any, Any], env: dict, twin: dict) -> Value:
        one, two = atoms
        if isinstance(one, Literal) and isinstance(two, Literal):
            return number(np.asarray(one.val), np.asarray(two.val), self.sizes)
        if isinstance(one, Literal) or isinstance(two, Literal) or twin[one] is not two:
            return mixed("the program itself changes with the batch size")
        return env[one]

    def _equation(self, eqns: tuple[Any, Any], env: dict, twin: dict, outer: str) -> list[Value]:
        one, two = eqns
        source = source_line(one, outer)
        if one.primitive.name != two.primitive.name or len(one.invars) != len(two.invars):
            reason = "the program itself changes with the batch size"
            return [mixed(reason, source)] * len(one.outvars)
        ins = [self._read(atoms, env, twin) for atoms in zip(one.invars, two.invars, strict=True)]
        ins = [mixed(v.reason, source) if v.kind is Kind.MIXED and not v.source else v for v in ins]
        name = one.primitive.name
        if name in CALLS:
            outs = self._called(eqns, ins, source)
        elif name == "scan":
            outs = self._scan(eqns, ins, source)
        elif name == "while":
            outs = self._while(eqns, ins, source)
        elif name == "cond":
            outs = self._cond(eqns, ins, source)
        else:
            outs = self._primitive(eqns, ins, source)
        return [
            self._checked(v, (a.aval, b.aval), source)
            for v, a, b in zip(outs, one.outvars, two.outvars, strict=True)
        ]

    def _checked(self, v: Value, avals: tuple[Any, Any], source: str) -> Value:
        """The claim must agree with which dims grow with the batch."""
        if v.kind is Kind.MIXED:
            return v if v.source else mixed(v.reason, source)
        scaled = scaled_dims(avals)
        if v.kind is Kind.ZERO and len(scaled) == 1:
            v = examples(scaled[0])
        if v.kind in (Kind.SAME, Kind.SUM, Kind.ZERO):
            fits = not scaled
        else:
            b1, b2 = self.sizes
            fits = scaled == (v.dim,)
            if fits:
                n1, n2 = (a.shape[v.dim] for a in avals)
                fits = n1 % b1 == 0 and n1 * b2 == n2 * b1
                fits = fits and (v.kind is not Kind.POSITION or n1 == b1)
        shape = tuple(avals[0].shape)
        return v if fits else mixed(f"an array of shape {shape} mixes the batch", source)

    def _primitive(self, eqns: tuple[Any, Any], ins: list[Value], source: str) -> list[Value]:
        one, two = eqns
        count = len(one.outvars)
        out_avals = tuple((a.aval, b.aval) for a, b in zip(one.outvars, two.outvars, strict=True))
        op = Op(
            name=one.primitive.name,
            params=one.params,
            params2=two.params,
            ins=tuple(ins),
            in_avals=tuple((a.aval, b.aval) for a, b in zip(one.invars, two.invars, strict=True)),
            out_avals=out_avals,
            sizes=self.sizes,
            source=source,
            ignore_random=self.ignore_random,
        )
        rule = _ALL_RULES.get(op.name)
        if (bad := _first_mixed(ins)) and not (op.name == "select_n" and ins[0].kind is Kind.NEVER):
            return [bad] * count
        changed = changed_params(one.params, two.params)
        if changed:
            return [op.mixed(f"`{op.name}` has {changed} that depends on the batch size")] * count
        if one.effects:
            return [op.mixed(f"`{op.name}` has side effects")] * count
        same = all(v.same for v in ins) and not any(map(scaled_dims, out_avals))
        if same and not (rule in _ZERO_RULES and ins and ins[0].kind is Kind.ZERO):
            return [SAME] * count
        if rule is None:
            return [op.mixed(f"primitive `{op.name}` is not known")] * count
        if rule not in _POSITION_RULES and any(
            v.kind in (Kind.POSITION, Kind.COLUMNS) for v in ins
        ):
            return [op.mixed("uses the position of each example in the batch")] * count
        outs = rule(op)
        return outs * count if len(outs) == 1 else outs

    def _called(self, eqns: tuple[Any, Any], ins: list[Value], source: str) -> list[Value]:
        one, two = eqns
        key = body_of(one.params)
        touched = not all(v.same for v in ins)
        if one.primitive.name.startswith("custom") and touched and not is_trusted_rule(one):
            self.untrusted = self.untrusted or source
        return self.call((one.params[key], two.params[key]), ins, source)

    def _scan(self, eqns: tuple[Any, Any], ins: list[Value], source: str) -> list[Value]:
        p, p2 = (e.params for e in eqns)
        if p["length"] != p2["length"]:
            return [mixed("a loop over the batch", source)] * len(eqns[0].outvars)
        first, last = itertools.accumulate(scan_counts(p))
        consts, carry, xs = ins[:first], ins[first:last], ins[last:]
        xs = [_shifted(v, -1) for v in xs]
        pair = (p["jaxpr"], p2["jaxpr"])
        while True:
            outs = self.call(pair, [*consts, *carry, *xs], source)
            joined = [join(a, b, source) for a, b in zip(carry, outs, strict=False)]
            if joined == carry:
                return [*carry, *(_shifted(v, 1) for v in outs[len(carry) :])]
            carry = joined

    def _while(self, eqns: tuple[Any, Any], ins: list[Value], source: str) -> list[Value]:
        p, p2 = (e.params for e in eqns)
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        carry, bodies = ins[m:], (p["body_jaxpr"], p2["body_jaxpr"])
        while True:
            outs = self.call(bodies, [*ins[n:m], *carry], source)
            joined = [join(a, b, source) for a, b in zip(carry, outs, strict=True)]
            if joined == carry:
                break
            carry = joined
        (go_on,) = self.call((p["cond_jaxpr"], p2["cond_jaxpr"]), [*ins[:n], *carry], source)
        if go_on.same:
            return carry
        return [mixed("a while loop whose condition depends on the batch", source)] * len(carry)

    def _cond(self, eqns: tuple[Any, Any], ins: list[Value], source: str) -> list[Value]:
        index, *operands = ins
        branches = [e.params["branches"] for e in eqns]
        if not index.same or len(branches[0]) != len(branches[1]):
            reason = "a `cond` whose predicate depends on the batch"
            return [mixed(reason, source)] * len(eqns[0].outvars)
        results = [self.call(pair, operands, source) for pair in zip(*branches, strict=True)]
        outs = results[0]
        for other in results[1:]:
            outs = [join(a, b, source) for a, b in zip(outs, other, strict=True)]
        return outs


def _first_mixed(values: list[Value]) -> Value | None:
    return next((v for v in values if v.kind is Kind.MIXED), None)


def _shifted(v: Value, by: int) -> Value:
    """Scanned operands lose their leading dim inside the body, stacked outputs gain one."""
    if v.dim == -1:
        return v
    if v.dim + by < 0:
        return mixed("a loop over the batch")
    return Value(v.kind, v.dim + by) if v.per_example else mixed("an arange over the batch")
