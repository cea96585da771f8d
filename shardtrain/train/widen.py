"""Gradients of bfloat16 programs in float32, from the first sum to the last.

Autodiff gives a weight gradient the dtype of the weight as it was used: a matmul of bfloat16
arrays writes its sum over the batch in bfloat16, the partitioner adds those over the mesh in
bfloat16, loops over layers add in bfloat16. Casting afterwards is too late. Here the traced
gradient is followed back from its outputs through everything that only moves or adds gradients
(transposes, loops, rematerialised blocks, sharding constraints) to the operations that make them;
those write float32 instead, which matrix units compute anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from shardtrain.compat import scan_counts
from shardtrain.replay import bind, bodies, contains, read, reopen, start
from shardtrain.train.followed import MOVES, Vars, followed_values, is_cast, is_narrow, scan_chosen

_CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})


def widen(fn: Callable[..., Any], wanted: Callable[[Any], Any] = lambda out: out) -> Any:
    """The same function, whose wanted outputs are computed and summed in float32.

    Args:
      fn: A gradient function of arrays, traceable by `jax.make_jaxpr`.
      wanted: Picks from the function's result the part to widen; by default all of it.

    Returns:
      A function of the same arguments. Wanted outputs of a narrower floating-point dtype come
      back as float32; the others as they were.

    Example:
      >>> x = jax.numpy.ones((4, 2), "bfloat16")
      >>> widen(jax.grad(lambda w: (x @ w).sum()))(jax.numpy.ones((2, 3), "bfloat16")).dtype
      dtype('float32')
    """

    def wide(*args: Any) -> Any:
        traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves, structure = jax.tree.flatten(shapes)
        marked = jax.tree.unflatten(structure, range(len(leaves)))
        numbers = set(jax.tree.leaves(wanted(marked)))
        chosen = [i in numbers for i in range(len(leaves))]
        makes_narrow = lambda eqn: any(map(is_narrow, eqn.outvars))
        if any(contains(eqn, makes_narrow) for eqn in traced.jaxpr.eqns):
            outs = _run(traced, chosen, jax.tree.leaves(args))
        else:
            outs = jex.jaxpr_as_fun(traced)(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, outs)

    return wide


def _run(program: jex.ClosedJaxpr, chosen: Sequence[bool], args: Sequence[Any]) -> list[Any]:
    """Evaluate; values that are followed are kept in float32, the others as traced.

    Args:
      program: The traced function.
      chosen: Outputs to give in float32.
      args: Inputs; those that are followed may already be float32.
    """
    followed = followed_values(program, chosen)
    env = start(program, args)
    for eqn in program.jaxpr.eqns:
        outs = [v in followed for v in eqn.outvars]
        values = [read(env, a) for a in eqn.invars]
        if any(o and is_narrow(v) for o, v in zip(outs, eqn.outvars, strict=True)) or (
            any(outs) and (bodies(eqn) or is_cast(eqn))
        ):
            made = _wide(eqn, values, outs)
        else:
            exact = [_as(v, a.aval) for v, a in zip(values, eqn.invars, strict=True)]
            made = _as_traced(eqn, exact, outs)
        env.update(zip(eqn.outvars, made, strict=True))
    return [
        _float32(read(env, a)) if c else _as(read(env, a), a.aval)
        for a, c in zip(program.jaxpr.outvars, chosen, strict=True)
    ]


def _as_traced(eqn: jex.JaxprEqn, ins: list[Any], outs: list[bool]) -> list[Any]:
    """One equation as it is, but for matmuls of narrow arrays into float32 (see `_contract`)."""
    if not contains(eqn, _contracts_into_float32):
        return bind(eqn, ins)
    if eqn.primitive.name in _CONTRACTIONS:
        return [_contract(eqn, ins)]
    return _wide_bodies(eqn, ins, outs) if bodies(eqn) else bind(eqn, ins)


def _contracts_into_float32(eqn: jex.JaxprEqn) -> bool:
    narrow = eqn.primitive.name in _CONTRACTIONS and all(map(is_narrow, eqn.invars[:2]))
    return narrow and not is_narrow(eqn.outvars[0])


def _wide(eqn: jex.JaxprEqn, values: list[Any], outs: list[bool]) -> list[Any]:
    """One equation whose outputs are wanted in float32."""
    name = eqn.primitive.name
    if is_cast(eqn):
        return [_float32(values[0])]
    if name in ("scatter-add", "scatter_add"):
        return [_scatter_add(eqn, values)]
    if name in MOVES or name == "reduce_sum":
        ins = [_float32(v) for v in values]  # indices are integers and stay
        return bind(_retyped(eqn, ins, outs), ins)
    exact = [_as(v, a.aval) for v, a in zip(values, eqn.invars, strict=True)]
    if name in _CONTRACTIONS:
        return [_contract(eqn, exact)]
    if bodies(eqn):
        return _wide_bodies(eqn, values, outs)
    made = bind(eqn, exact)  # an operation with a dtype of its own: cast what it gives
    return [_float32(m) if o else m for m, o in zip(made, outs, strict=True)]


def _contract(eqn: jex.JaxprEqn, ins: list[Any]) -> Any:
    """A matmul or convolution of narrow arrays into float32."""
    params = {**eqn.params, "preferred_element_type": jnp.dtype(jnp.float32)}
    into = eqn.replace(params=params)
    run = lambda *ins: bind(_retyped(into, ins, [True]), ins)[0]
    # XLA's CPU backend has no kernel for bfloat16 x bfloat16 -> float32; products are exact
    # either way, so the sums are the same.
    on_cpu = lambda *ins: run(*map(_float32, ins))
    return lax.platform_dependent(*ins, cpu=on_cpu, default=run)


def _scatter_add(eqn: jex.JaxprEqn, values: list[Any]) -> Any:
    operand, indices, updates = values
    options = {k: eqn.params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
    numbers = eqn.params["dimension_numbers"]
    return lax.scatter_add(_float32(operand), indices, _float32(updates), numbers, **options)


def _wide_bodies(eqn: jex.JaxprEqn, values: list[Any], outs: list[bool]) -> list[Any]:
    chosen = scan_chosen(eqn, outs) if eqn.primitive.name == "scan" else outs
    inside, skip = bodies(eqn), 1 if eqn.primitive.name == "cond" else 0
    wide: Vars = set()
    for body in inside:
        followed = followed_values(body, chosen)
        pairs = zip(eqn.invars[skip:], body.jaxpr.invars, strict=True)
        wide.update(i for _, i in pairs if i in followed)
    needed = [
        any(body.jaxpr.invars[n] in wide for body in inside) for n in range(len(values) - skip)
    ]
    if eqn.primitive.name == "scan":
        first, carried = scan_counts(eqn.params)
        for n in range(carried):
            needed[first + n] = needed[first + n] or chosen[n]
    ins = values[:skip] + [
        _float32(v) if n else _as(v, a.aval)
        for v, a, n in zip(values[skip:], eqn.invars[skip:], needed, strict=True)
    ]
    functions = [lambda *args, b=b: _run(b, chosen, args) for b in inside]
    if "prevent_cse" in eqn.params:
        return _remat(eqn, ins, functions[0])
    return reopen(eqn, ins, functions)


def _remat(eqn: jex.JaxprEqn, ins: list[Any], function: Callable[..., list[Any]]) -> list[Any]:
    """A rematerialised block of a backward pass: its equation again, so that it stays one.

    A fresh `jax.checkpoint` would count as not yet differentiated, and XLA would merge what is
    to be computed again with the forward pass.
    """
    traced = jax.make_jaxpr(function)(*ins)
    held, inner = list(traced.consts), traced.jaxpr
    jaxpr = jex.Jaxpr(
        (),
        [*inner.constvars, *inner.invars],
        inner.outvars,
        inner.eqns,
        inner.effects,
        jex.DebugInfo("widen", "remat", ("",) * (len(held) + len(ins)), ("",) * len(inner.outvars)),
    )
    like = eqn.params["jaxpr"]
    body = jex.ClosedJaxpr(jaxpr, ()) if isinstance(like, jex.ClosedJaxpr) else jaxpr
    params = {**eqn.params, "jaxpr": body}
    invars: list[Any] = [jex.Var(v.aval) for v in jaxpr.invars]
    outvars = [jex.Var(v.aval) for v in jaxpr.outvars]
    return bind(eqn.replace(params=params, invars=invars, outvars=outvars), [*held, *ins])


def _retyped(eqn: jex.JaxprEqn, ins: Sequence[Any], outs: Sequence[bool]) -> jex.JaxprEqn:
    """The equation with the dtypes that its operands now have and its outputs shall have."""
    invars: list[Any] = [
        jex.Var(a.aval.update(dtype=jnp.result_type(v)))
        for a, v in zip(eqn.invars, ins, strict=True)
    ]
    outvars = [
        jex.Var(v.aval.update(dtype=jnp.dtype(jnp.float32))) if o and is_narrow(v) else v
        for v, o in zip(eqn.outvars, outs, strict=True)
    ]
    return eqn.replace(invars=invars, outvars=outvars)


def _float32(x: Any) -> Any:
    narrow = jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.result_type(x).itemsize < 4
    return jnp.asarray(x, jnp.float32) if narrow else x


def _as(x: Any, aval: Any) -> Any:
    """A value in the dtype it was traced with."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.result_type(x) == dtype:
        return x
    return jnp.asarray(x, dtype)
