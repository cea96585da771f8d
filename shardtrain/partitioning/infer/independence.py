"""Is a loss a sum over examples? The proof that lets a batch be split and the parts added."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from shardtrain.partitioning.infer.batch_value import SAME, Kind, Value, describe, examples
from shardtrain.partitioning.infer.batch_walk import Walk
from shardtrain.partitioning.infer.source import path_string

# What model code raises when it refuses a batch size while being traced.
_TRACE_ERRORS = (
    TypeError,
    ValueError,
    AssertionError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    FlaxError,
)


@dataclass(frozen=True)
class OutputVerdict:
    """Whether one output of the function adds up over parts of the batch."""

    path: str
    ok: bool
    reason: str
    source: str


@dataclass(frozen=True)
class Independence:
    """The answer of `batch_independence`: `ok`, or the first reason and source line against."""

    ok: bool
    reason: str
    source: str
    outputs: tuple[OutputVerdict, ...] = ()

    def __bool__(self) -> bool:
        return self.ok


def batch_independence(
    fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *rest: Any,
    parts: int | None = None,
    ignore_random: bool = False,
) -> Independence:
    """Prove that splitting the batch, calling `fn` on each part and adding gives the same result.

    `fn(params, batch, *rest)` is traced at the batch size given and at another one (that of a part
    where `parts` says how many). Walking both programs side by side, every value is found to be
    the same for all parts, one row per example, a sum over examples, or none of these; shapes,
    numbers and parameters that differ between the traces depend on the batch size. A custom
    derivative written by the user is checked too, by proving the gradient in the same way. The
    answer is conservative: `ok` is only true when every step is understood. "The same" is up to
    the order of floating-point additions.

    Args:
      fn: returns a pytree of scalars or arrays, such as `(loss_sum, weight)`.
      params: pytree of arrays or `jax.ShapeDtypeStruct`; not split.
      batch: pytree of the same whose leaves all have the batch as dim 0.
      *rest: further arguments, not split (such as random keys).
      parts: number of equal parts the batch will be split into, if known.
      ignore_random: treat random numbers drawn for the batch (dropout masks) as per-example noise:
        the parts then add up in distribution, not number by number.

    Returns:
      `Independence`; falsy when not proven, with the reason and the line of the model at fault.

    Example:
      >>> x, w = jax.ShapeDtypeStruct((8, 4), "float32"), jax.ShapeDtypeStruct((4,), "float32")
      >>> batch_independence(lambda w, x: (x @ w).sum(), w, x).ok
      True
      >>> batch_independence(lambda w, x: (x @ w).mean(), w, x).ok
      False
    """
    leaves = jax.tree.leaves(batch)
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in map(_abstract, leaves)}
    if len(sizes) != 1 or -1 in sizes:
        return Independence(False, "the leaves of the batch have no common leading dim", "")
    (given,) = sizes
    first = given if given > 1 else 2
    other = 2 * first
    if parts and first % parts == 0 and first // parts > 1 and parts > 1:
        other = first // parts
    walk = Walk((first, other), ignore_random)
    found = _prove(fn, params, batch, rest, walk)
    if found.ok and walk.untrusted:
        source = walk.untrusted
        inner = _prove(_gradient(fn), params, batch, rest, Walk((first, other), ignore_random))
        if not inner.ok:
            reason = f"a custom derivative couples examples: {inner.reason}"
            return Independence(False, reason, inner.source or source, found.outputs)
    return found


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct((), jnp.result_type(x))


def _resized(batch: Any, size: int) -> Any:
    def resize(x: Any) -> jax.ShapeDtypeStruct:
        x = _abstract(x)
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)

    return jax.tree.map(resize, batch)


def _prove(fn: Any, params: Any, batch: Any, rest: tuple, walk: Walk) -> Independence:
    """Trace at both sizes, walk, and judge each output."""
    params, rest = jax.tree.map(_abstract, (params, rest))
    trace = jax.make_jaxpr(fn, return_shape=True)
    one, shapes = trace(params, _resized(batch, walk.sizes[0]), *rest)
    try:
        two, _ = trace(params, _resized(batch, walk.sizes[1]), *rest)
    except _TRACE_ERRORS as error:
        reason = f"the function cannot be traced at batch size {walk.sizes[1]}: {error}"
        return Independence(False, reason, "")
    count = len(jax.tree.leaves(params)), len(jax.tree.leaves(batch))
    ins = [SAME] * count[0] + [examples(0)] * count[1]
    ins += [SAME] * (len(one.jaxpr.invars) - sum(count))
    outs = walk.call((one, two), ins)
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    if len(one.jaxpr.outvars) != len(two.jaxpr.outvars):
        return Independence(False, "the outputs change with the batch size", "")
    verdicts = tuple(map(_verdict, paths, outs))
    bad = next((v for v in verdicts if not v.ok), None)
    if bad is None:
        return Independence(True, "a sum over examples", "", verdicts)
    name = f"output {bad.path}: " if bad.path else ""
    return Independence(False, name + bad.reason, bad.source, verdicts)


def _verdict(path: str, value: Value) -> OutputVerdict:
    if value.additive:
        return OutputVerdict(path, True, describe(value), "")
    if value.kind is Kind.MIXED:
        return OutputVerdict(path, False, value.reason, value.source)
    if value.same:
        reason = "does not depend on the batch, so adding the parts would multiply it"
    else:
        reason = f"keeps the batch: {describe(value)}, not a sum"
    return OutputVerdict(path, False, reason, "")


def _gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of all floating-point outputs with respect to the floating-point parameters."""

    def total(floats: list, treedef: Any, fixed: list, batch: Any, rest: tuple) -> jax.Array:
        leaves = [b if a is None else a for a, b in zip(floats, fixed, strict=True)]
        outs = jax.tree.leaves(fn(jax.tree.unflatten(treedef, leaves), batch, *rest))
        return sum(x.sum() for x in outs if jnp.issubdtype(x.dtype, jnp.floating))

    def gradient(params: Any, batch: Any, *rest: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        floats = [x if f else None for x, f in zip(leaves, is_float, strict=True)]
        return jax.grad(total)(floats, treedef, leaves, batch, rest)

    return gradient
