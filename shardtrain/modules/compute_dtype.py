"""bfloat16 in the matmuls of Flax's layers, whatever dtype reaches them.

Design: parameters and the model's inputs are cast where the model is called, and most layers follow
them. Two things in a model nobody prepared bring float32 back: `nnx.Embed`, which takes its
parameters' dtype for its own when none is given, and any float32 array that meets an activation
(rotary angles, masks, noise, the first state of a recurrence). So embeddings without a dtype get
the compute dtype, unless a loop of the model then changes the dtype of what it carries. And a layer
that multiplies, and was given no dtype by its author, casts its inputs down, and its result back to
what they were: the dtypes that the rest of the model sees do not change. A layer with a dtype of
its own keeps it.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

LINEN_PRODUCTS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.ConvLocal)
NNX_PRODUCTS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Floating-point arrays in another dtype; everything else as it is."""

    def cast(x: Any) -> Any:
        is_float = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_float else x

    return jax.tree.map(cast, tree)


def call_product(call: Callable[..., Any], args: Any, kwargs: Any, dtype: Any) -> Any:
    """Call a layer that multiplies with its inputs in `dtype`, its result in theirs."""
    leaves = jax.tree.leaves((args, kwargs))
    wide = any(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in leaves)
    out = call(*cast_floating(args, dtype), **cast_floating(kwargs, dtype))
    return cast_floating(out, jnp.float32) if wide else out


def narrow_embeddings(root: nnx.Module, dtype: Any) -> None:
    """Give embeddings that have their parameters' dtype the compute dtype.

    Args:
      root: The model, merged for one trace alone.
      dtype: The compute dtype.
    """
    for _, module in nnx.iter_modules(root):
        if isinstance(module, nnx.Embed) and module.dtype == module.param_dtype:
            module.dtype = dtype


@contextlib.contextmanager
def nnx_products(dtype: Any) -> Generator[None]:
    """NNX layers that are traced inside this context compute in `dtype`."""
    with contextlib.ExitStack() as stack:
        attend = _attend(nnx.Embed.attend, dtype)
        stack.enter_context(mock.patch.object(nnx.Embed, "attend", attend))
        for layer in NNX_PRODUCTS:
            patched = _product(layer.__call__, dtype)
            stack.enter_context(mock.patch.object(layer, "__call__", patched))
        yield


def _attend(original: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """Logits by the embedding; one that was given no dtype has that of its parameters."""

    def call(self: Any, query: jax.Array) -> Any:
        own = self.dtype
        if own != self.param_dtype:
            return original(self, query)
        self.dtype = dtype
        try:
            return call_product(lambda q: original(self, q), (query,), {}, dtype)
        finally:
            self.dtype = own

    return call


def _product(original: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dtype is not None:
            return original(self, *args, **kwargs)
        return call_product(lambda *a, **k: original(self, *a, **k), args, kwargs, dtype)

    return call
