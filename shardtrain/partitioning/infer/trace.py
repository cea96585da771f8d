"""From a loss to a dead-code-free jaxpr with abstract parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from shardtrain.partitioning.infer.source import path_string


@dataclass(frozen=True)
class Program:
    """A traced function: its jaxpr and the paths and shapes of its inputs."""

    jaxpr: Any
    params: tuple[tuple[str, Any], ...]  # path, ShapeDtypeStruct
    inputs: tuple[tuple[str, Any], ...]
    has_gradient: bool


def trace(fn: Callable[..., Any], params: Any, args: tuple[Any, ...], *, grad: bool) -> Program:
    """Trace `fn(params, *args)`, with its gradient when asked, without allocating anything.

    Args:
      fn: returns a scalar loss or a pytree; the gradient is that of the sum of its
        floating-point leaves.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      args: further arguments.
      grad: include the backward pass.

    Returns:
      The program after dead-code elimination (scanned layers return their parameters as unused
      outputs; those would tie dims that have nothing to do with each other).
    """
    params, args = jax.tree.map(_abstract, (params, args))
    leaves, treedef = jax.tree.flatten(params)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(some: list[Any], leaves: list[Any], args: tuple[Any, ...]) -> Any:
        leaves = list(leaves)
        for i, x in zip(floats, some, strict=True):
            leaves[i] = x
        out = fn(jax.tree.unflatten(treedef, leaves), *args)
        total = [x.sum() for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return (sum(total), out) if grad else out

    def program(leaves: list[Any], args: tuple[Any, ...]) -> Any:
        some = [leaves[i] for i in floats]
        if not grad:
            return loss(some, leaves, args)
        return jax.value_and_grad(loss, has_aux=True)(some, leaves, args)

    closed = jax.make_jaxpr(program)(leaves, args)
    alive = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, alive, instantiate=True)
    inputs = args[0] if len(args) == 1 else args
    return Program(jaxpr, _named(params), _named(inputs), grad and bool(floats))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct((), jnp.result_type(x))


def _named(tree: Any) -> tuple[tuple[str, Any], ...]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return tuple((path_string(path), leaf) for path, leaf in found)
