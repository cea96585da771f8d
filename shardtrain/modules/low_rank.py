"""Evaluates a function of corrected weights W + s A B without ever adding them up.

Design: the function is traced with the weights as plain arrays; the trace is then evaluated with
`LowRank` values in their place. A product with one becomes x W + s (x A) B: no array of W's size is
made, and W has no gradient. An operation that is no such product gets the sum, which is always
right.

Source: the order of products is that of LoRA, arXiv:2106.09685.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from shardtrain.compat import scan_counts
from shardtrain.replay import bind, bodies, read, reopen, start


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "a", "b"),
    meta_fields=("inputs", "outputs", "scale", "stacked"),
)
@dataclass(frozen=True)
class LowRank:
    """`weight + scale * a b`, a matrix whose two sides may have several dims each.

    Args:
      weight: All dims of both sides.
      a: `[*dims of the input side, r]`.
      b: `[r, *dims of the output side]`.
      inputs: Which dim of `weight` each dim of `a` is.
      outputs: Which dim of `weight` each dim of `b` is.
      scale: s.
      stacked: All three have a leading dim besides, which counts layers (and is dim 0 of `weight`,
        not counted by `inputs` and `outputs`).
    """

    weight: jax.Array
    a: jax.Array
    b: jax.Array
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scale: float
    stacked: bool = False

    def dense(self) -> jax.Array:
        """The sum."""
        product = lambda a, b: jnp.tensordot(a, b, axes=1)
        change = (jax.vmap(product) if self.stacked else product)(self.a, self.b)
        order = (*self.inputs, *self.outputs)
        back = tuple(order.index(d) for d in range(len(order)))
        if self.stacked:
            back = (0, *(d + 1 for d in back))
        return self.weight + (self.scale * jnp.transpose(change, back)).astype(self.weight.dtype)


def evaluate_low_rank(fn: Callable[..., Any], weights: Any, *args: Any) -> Any:
    """`fn(weights, *args)`, where leaves of `weights` may be `LowRank`.

    Args:
      fn: A pure function of arrays.
      weights: Pytree of arrays and `LowRank`s.
      args: Further arguments.

    Example:
      >>> w = LowRank(jnp.eye(3), jnp.ones((3, 1)), jnp.ones((1, 3)), (0,), (1,), 0.5)
      >>> evaluate_low_rank(lambda w, x: x @ w, w, jnp.ones(3)).tolist()
      [2.5, 2.5, 2.5]
    """
    is_low_rank = lambda x: isinstance(x, LowRank)
    plain = lambda x: jax.ShapeDtypeStruct(x.weight.shape, x.weight.dtype) if is_low_rank(x) else x
    shapes = jax.tree.map(plain, weights, is_leaf=is_low_rank)
    closed, out = jax.make_jaxpr(fn, return_shape=True)(shapes, *args)
    values = [*jax.tree.leaves(weights, is_leaf=is_low_rank), *jax.tree.leaves(args)]
    return jax.tree.unflatten(jax.tree.structure(out), _evaluate(closed, values))


def _evaluate(closed: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    env = start(closed, args)
    for eqn in closed.jaxpr.eqns:
        ins = [read(env, a) for a in eqn.invars]
        env.update(zip(eqn.outvars, _apply(eqn, ins), strict=True))
    return [_dense(read(env, a)) for a in closed.jaxpr.outvars]


def _dense(x: Any) -> Any:
    return x.dense() if isinstance(x, LowRank) else x


def _apply(eqn: jex.JaxprEqn, ins: Sequence[Any]) -> Sequence[Any]:
    if not any(isinstance(x, LowRank) for x in ins):
        return bind(eqn, ins)
    if bodies(eqn):
        functions = [lambda *args, b=b: _evaluate(b, args) for b in bodies(eqn)]
        return reopen(eqn, _enterable(eqn, ins), functions)
    rule = _RULES.get(eqn.primitive.name)
    found = rule(eqn, ins) if rule is not None else None
    return [found] if found is not None else bind(eqn, [_dense(x) for x in ins])


def _enterable(eqn: jex.JaxprEqn, ins: Sequence[Any]) -> list[Any]:
    """What may go into a body as it is; a scan takes one layer of a stack at a time."""
    if eqn.primitive.name != "scan":
        return list(ins)
    first, carried = scan_counts(eqn.params)
    parts = list(ins)
    for i, x in enumerate(ins):
        if not isinstance(x, LowRank) or i < first:
            continue
        if i >= first + carried and x.stacked:
            parts[i] = LowRank(x.weight, x.a, x.b, x.inputs, x.outputs, x.scale)
        else:
            parts[i] = x.dense()
    return parts


# -- what stays a low-rank sum ----------------------------------------------------------------


def _converted(eqn: jex.JaxprEqn, ins: Sequence[Any]) -> LowRank:
    (x,), dtype = ins, eqn.params["new_dtype"]
    a, b = x.a.astype(dtype), x.b.astype(dtype)
    return LowRank(x.weight.astype(dtype), a, b, x.inputs, x.outputs, x.scale, x.stacked)


def _transposed(eqn: jex.JaxprEqn, ins: Sequence[Any]) -> LowRank | None:
    (x,), order = ins, eqn.params["permutation"]
    if x.stacked:
        return None
    moved = lambda dims: tuple(order.index(d) for d in dims)
    weight = jnp.transpose(x.weight, order)
    return LowRank(weight, x.a, x.b, moved(x.inputs), moved(x.outputs), x.scale)


def _reshaped(eqn: jex.JaxprEqn, ins: Sequence[Any]) -> LowRank | None:
    """Dims of one side may be split and merged; the border between the sides must stay."""
    x, shape = ins[0], eqn.params["new_sizes"]
    count = len(x.inputs)
    in_order = (*x.inputs, *x.outputs) == tuple(range(x.weight.ndim))
    if x.stacked or not in_order or eqn.params.get("dimensions") is not None:
        return None
    size = math.prod(x.weight.shape[:count])
    cuts = [i for i in range(1, len(shape)) if math.prod(shape[:i]) == size]
    if not cuts:
        return None
    inner, outer = shape[: cuts[0]], shape[cuts[0] :]
    a, b = x.a.reshape(*inner, x.a.shape[-1]), x.b.reshape(x.b.shape[0], *outer)
    dims = tuple(range(len(shape)))
    cut = cuts[0]
    return LowRank(x.weight.reshape(shape), a, b, dims[:cut], dims[cut:], x.scale)


def _product(eqn: jex.JaxprEqn, ins: Sequence[Any]) -> jax.Array | None:
    """`x W + s (x A) B`, where one whole side of W is contracted."""
    lhs, rhs = ins
    if isinstance(lhs, LowRank) and isinstance(rhs, LowRank):
        return None
    (contracted, batch) = eqn.params["dimension_numbers"]
    weight_first = isinstance(lhs, LowRank)
    w, x = (lhs, rhs) if weight_first else (rhs, lhs)
    w_dims, x_dims = contracted if weight_first else contracted[::-1]
    if w.stacked or any(batch) or set(w_dims) not in (set(w.inputs), set(w.outputs)):
        return None
    forwards = set(w_dims) == set(w.inputs)
    side, other = (w.inputs, w.outputs) if forwards else (w.outputs, w.inputs)
    # The factor that is contracted, rank last; then the other, rank first.
    near = w.a if forwards else jnp.moveaxis(w.b, 0, -1)
    far = w.b if forwards else jnp.moveaxis(w.a, -1, 0)
    options = {k: eqn.params[k] for k in ("precision", "preferred_element_type")}
    dims = ((tuple(x_dims), tuple(side.index(d) for d in w_dims)), ((), ()))
    inner = lax.dot_general(x, near, dims, **options).astype(x.dtype)
    change = lax.dot_general(inner, far, (((inner.ndim - 1,), (0,)), ((), ())), **options)
    # Free dims of x, then those of w in the order in which the weight has them.
    free = inner.ndim - 1
    by_weight = sorted(range(len(other)), key=lambda i: other[i])
    tail = [free + i for i in by_weight]
    change = jnp.transpose(change, (*tail, *range(free)) if weight_first else (*range(free), *tail))
    plain = bind(eqn, [w.weight, x] if weight_first else [x, w.weight])[0]
    return plain + (w.scale * change).astype(plain.dtype)


_RULES: dict[str, Callable[[jex.JaxprEqn, Sequence[Any]], Any]] = {
    "convert_element_type": _converted,
    "transpose": _transposed,
    "reshape": _reshaped,
    "dot_general": _product,
}
