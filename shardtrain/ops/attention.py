"""Attention by the fastest implementation that applies, and why."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from shardtrain.errors import ModelError, suggest
from shardtrain.ops.here import here
from shardtrain.ops.ring_attention import AXIS, ring_attention

Shaped = jax.Array | jax.ShapeDtypeStruct
IMPLEMENTATIONS = ("auto", "ring", "cudnn", "xla")


@dataclass(frozen=True)
class AttentionChoice:
    """An implementation and the reason for it."""

    implementation: str
    reason: str


def choose_attention(
    query: Shaped, key: Shaped, *, platform: str | None = None, context: int = 1
) -> AttentionChoice:
    """The implementation for these shapes on this platform.

    cuDNN's flash attention takes half-precision arrays with a head dim that is a multiple of 8, at
    most 128; elsewhere XLA fuses what it can.

    Args:
      query: `[B, T, N, H]`, an array or `jax.ShapeDtypeStruct`.
      key: `[B, S, K, H]`.
      platform: "cpu", "gpu" or "tpu"; None: where JAX runs.
      context: Size of the mesh axis `context`.

    Example:
      >>> q = jax.ShapeDtypeStruct((1, 128, 8, 64), jnp.bfloat16)
      >>> choose_attention(q, q, platform="gpu").implementation
      'cudnn'
    """
    platform = platform or jax.default_backend()
    if context > 1:
        return AttentionChoice("ring", f"the sequence is sharded over context={context}")
    if platform not in ("gpu", "cuda"):
        return AttentionChoice("xla", f"cuDNN runs on GPUs, this is {platform}")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return AttentionChoice("xla", f"cuDNN takes bfloat16 or float16, not {query.dtype}")
    dim = query.shape[-1]
    if dim > 128 or dim % 8:
        return AttentionChoice("xla", f"head dim {dim} is not a multiple of 8 up to 128")
    if query.shape[1] % 2 or key.shape[1] % 2:
        odd = (query.shape[1], key.shape[1])
        return AttentionChoice("xla", f"cuDNN's backward pass takes even lengths, not {odd}")
    return AttentionChoice("cudnn", f"{query.dtype}, head dim {dim}")


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = True,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention with grouped heads.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N.
      value: `[B, S, K, H]`.
      causal: Position t sees positions 0 to t.
      implementation: "auto" (see `choose_attention`), "ring", "cudnn" or "xla".

    Returns:
      `[B, T, N, H]`.

    Raises:
      ModelError: Unknown implementation, or shapes it does not take.

    Example:
      >>> x = jnp.ones((1, 4, 2, 8))
      >>> attention(x, x, x).shape
      (1, 4, 2, 8)
    """
    if implementation not in IMPLEMENTATIONS:
        hint = suggest(implementation, IMPLEMENTATIONS)
        raise ModelError(f"attention implementation {implementation!r} is not known: {hint}")
    if implementation == "auto":
        implementation = choose_attention(query, key, context=here().size(AXIS)).implementation
    if implementation == "ring":
        return ring_attention(query, key, value, causal=causal)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        implementation="cudnn" if implementation == "cudnn" else "xla",
    )
