"""Acting on a model's calls without changing its code: dtype at its border, remat per block.

Design: the model is traced once per program, so its calls can be wrapped while tracing. Linen has
`nn.intercept_methods`; for NNX the class's `__call__` is replaced for the time of the trace.
"""

import contextlib
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.modules.compute_dtype import (
    LINEN_PRODUCTS,
    call_product,
    cast_floating,
    nnx_products,
)

_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_FUSED_ATTENTION = frozenset(
    {
        "dot_product_attention_fwd",
        "dot_product_attention_fwd_wrapper",
        "dot_product_attention_fp8_fwd",
        "dot_product_attention_fp8_fwd_wrapper",
    }
)
"""cuDNN's kernels: matmuls too, with a result no larger than their input."""


@dataclass(frozen=True)
class Calls:
    """What to do at a model's calls.

    Args:
      compute_dtype: Cast floating inputs of the whole model to it and outputs back to float32,
        and the inputs of layers that multiply; None leaves them alone.
      narrow_embeddings: `nnx.Embed` without a dtype of its own gives `compute_dtype`.
      remat: "none", "full", "dots" or "dots_no_batch": what each repeated block recomputes.
    """

    compute_dtype: Any = None
    remat: str = "none"
    narrow_embeddings: bool = False

    @property
    def active(self) -> bool:
        """Whether anything is to be done."""
        return self.compute_dtype is not None or self.remat != "none"


def remat_policy(name: str) -> Any:
    """The `jax.checkpoint` policy of a remat name (None: save nothing).

    JAX's own policies for matmuls recompute a fused attention kernel; here it counts as one.
    """
    if name == "full":
        return None
    is_dot = _POLICIES[name]

    def keep(primitive: Any, *avals: Any, **params: Any) -> Any:
        return primitive.name in _FUSED_ATTENTION or is_dot(primitive, *avals, **params)

    return keep


@contextlib.contextmanager
def linen_calls(calls: Calls, blocks: frozenset[tuple[str, ...]]) -> Generator[None]:
    """Wrap the calls of a bound Linen module traced inside this context.

    Args:
      calls: What to do.
      blocks: Paths of the repeated blocks.
    """
    depth = {"root": 0, "block": 0}

    def wrap(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        if calls.compute_dtype is not None and not module.path and not depth["root"]:
            with _inside(depth, "root"):
                args, kwargs = cast_floating((args, kwargs), calls.compute_dtype)
                return cast_floating(next_fun(*args, **kwargs), jnp.float32)
        is_block = module.path in blocks and name == "__call__" and not depth["block"]
        if calls.remat != "none" and is_block:
            return _linen_remat(module, args, kwargs, calls.remat, depth)
        is_product = isinstance(module, LINEN_PRODUCTS) and name == "__call__"
        if calls.compute_dtype is not None and is_product and module.dtype is None:
            return call_product(next_fun, args, kwargs, calls.compute_dtype)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(wrap):
        yield


def _linen_remat(module: Any, args: Any, kwargs: Any, policy: str, depth: dict[str, int]) -> Any:
    arrays, rebuild = _arrays_only(args, kwargs)

    def run(block: nn.Module, *arrays: Any) -> Any:
        with _inside(depth, "block"):
            args, kwargs = rebuild(arrays)
            return block(*args, **kwargs)  # type: ignore[operator]

    return nn.remat(run, policy=remat_policy(policy))(module, *arrays)


@contextlib.contextmanager
def nnx_calls(calls: Calls, root: nnx.Module, blocks: frozenset[type]) -> Generator[None]:
    """Wrap the calls of an NNX module traced inside this context.

    Args:
      calls: What to do.
      root: The whole model.
      blocks: Classes of the repeated blocks.
    """
    with contextlib.ExitStack() as stack:
        if calls.compute_dtype is not None:
            stack.enter_context(nnx_products(calls.compute_dtype))
        if calls.remat != "none":
            for block in blocks:
                stack.enter_context(
                    mock.patch.object(block, "__call__", _nnx_remat(block.__call__, calls.remat))
                )
        if calls.compute_dtype is not None and callable(root):
            original = type(root).__call__

            def cast_call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
                if self is not root:
                    return original(self, *args, **kwargs)
                args, kwargs = cast_floating((args, kwargs), calls.compute_dtype)
                return cast_floating(original(self, *args, **kwargs), jnp.float32)

            stack.enter_context(mock.patch.object(type(root), "__call__", cast_call))
        yield


def _nnx_remat(original: Callable[..., Any], policy: str) -> Callable[..., Any]:
    inside = {"block": 0}

    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        if inside["block"]:
            return original(self, *args, **kwargs)
        arrays, rebuild = _arrays_only(args, kwargs)

        def run(block: nnx.Module, *arrays: Any) -> Any:
            with _inside(inside, "block"):
                args, kwargs = rebuild(arrays)
                return original(block, *args, **kwargs)

        return nnx.remat(run, policy=remat_policy(policy))(self, *arrays)

    return call


def _arrays_only(args: Any, kwargs: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """Arrays of a call, which remat traces, apart from flags and modules, which it must not."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Module))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def rebuild(arrays: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(where, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(tree, filled)

    return [leaves[i] for i in where], rebuild


@contextlib.contextmanager
def _inside(depth: dict[str, int], what: str) -> Generator[None]:
    depth[what] += 1
    try:
        yield
    finally:
        depth[what] -= 1


def repeated(paths: Iterable[tuple[tuple[Any, ...], type]]) -> dict[tuple[Any, ...], type]:
    """Of all (path, class) pairs, the outermost groups of numbered siblings of one class.

    Example:
      >>> calls = [(("layers_0",), int), (("layers_1",), int), (("layers_0", "mlp"), str)]
      >>> sorted(repeated(calls))
      [('layers_0',), ('layers_1',)]
    """
    groups: dict[Any, dict[tuple[Any, ...], type]] = {}
    for path, kind in paths:
        if path and re.search(r"\d", str(path[-1])):
            stem = re.sub(r"\d+", "#", str(path[-1]))
            groups.setdefault((len(path), path[:-1], stem, kind), {})[path] = kind
    found = {key: group for key, group in groups.items() if len(group) > 1}
    if not found:
        return {}
    depth = min(key[0] for key in found)
    return {p: k for key, group in found.items() if key[0] == depth for p, k in group.items()}
