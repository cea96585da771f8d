"""Layers of the zoo in plain Flax NNX: norm, rotary position, grouped-query attention, SwiGLU.

Design: nothing here knows shardtrain. Each kernel names its dims with `nnx.with_partitioning`, the
annotation any Flax author can write; a `Strategy` decides which of these names are split. Shapes:
`B` rows, `T` positions, `K` key/value heads, `G` query heads per key/value head, `H` head dim.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain import ops


def named(init: nnx.Initializer, *names: str | None) -> Any:
    """An initializer whose array carries logical axis names, one per dim."""
    # eager_sharding=False: names are for the plan to read; without it Flax demands a mesh at once.
    return nnx.with_partitioning(init, names, eager_sharding=False)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`, statistics in float32 (Zhang and Sennrich 2019).

    Args:
      dim: Size of the last dim.
      epsilon: Added to the mean square.
      name: Logical axis of the last dim.
      rngs: Unused; there for the Flax convention.
    """

    def __init__(self, dim: int, *, epsilon: float = 1e-6, name: str = "embed", rngs: nnx.Rngs):
        self.scale = nnx.Param(named(nnx.initializers.ones, name)(rngs.params(), (dim,)))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., dim]` -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * self.scale[...]).astype(x.dtype)


@dataclass(frozen=True)
class RotaryStretch:
    """Slows long waves down: the model then reads further than it was first trained for.

    Args:
      factor: Waves longer than `length / low` become this much longer.
      low: See `factor`.
      high: Waves shorter than `length / high` stay; those between are blended.
      length: Positions of the first training.

    Source: Llama 3.1's model card and reference code.
    """

    factor: float
    low: float
    high: float
    length: int

    def __call__(self, frequency: jax.Array) -> jax.Array:
        """Radians per position, `[half]` -> the same, stretched."""
        turns = self.length * frequency / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return kept * frequency + (1 - kept) * frequency / self.factor


def rotary(
    x: jax.Array, theta: float = 10_000.0, stretch: RotaryStretch | None = None
) -> jax.Array:
    """Rotate pairs of features by an angle that grows with the position (Su et al. 2021).

    Args:
      x: `[B, T, ..., H]`, H even; positions are 0 to T - 1.
      theta: Base of the wavelengths.
      stretch: Changes the frequencies; None: they stay.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if stretch is not None:
        frequency = stretch(frequency)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    angle = angle.reshape(1, x.shape[1], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    """Dot-product attention; each key/value head serves G query heads (Ainslie et al. 2023).

    Args:
      query: `[B, T, K, G, H]`.
      key: `[B, S, K, H]`.
      value: `[B, S, K, H]`.
      causal: Position t sees positions 0 to t.

    Returns:
      `[B, T, K, G, H]` in the dtype of `value`; the softmax is float32.
    """
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key).astype(jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        seen = jnp.tri(query.shape[1], key.shape[1], dtype=bool)
        scores = jnp.where(seen, scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value)


class Attention(nnx.Module):
    """Self-attention with grouped key/value heads.

    Args:
      dim: Width of the residual stream.
      num_heads: Query heads.
      num_kv_heads: Key/value heads; divides `num_heads`.
      head_dim: Width of a head.
      causal: Positions see only what is before them.
      rope_theta: Base of the rotary position; None: no position here.
      rope_stretch: How its waves are stretched.
      qkv_bias: Whether queries, keys and values have a bias.
      out_bias: Whether the output has one.
      qk_norm: Epsilon of an `RMSNorm` of each query and key; None: no norm.
      implementation: "einsum", or one of `ops.attention`.
      rngs: Random streams.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        causal: bool = True,
        rope_theta: float | None = 10_000.0,
        rope_stretch: RotaryStretch | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: float | None = None,
        implementation: str = "einsum",
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal()

        def project(heads: int, name: str) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                dim,
                (heads, head_dim),
                use_bias=qkv_bias,
                kernel_init=named(init, "embed", name, "head_dim"),
                bias_init=named(nnx.initializers.zeros, name, "head_dim"),
                rngs=rngs,
            )

        self.query = project(num_heads, "heads")
        self.key = project(num_kv_heads, "kv_heads")
        self.value = project(num_kv_heads, "kv_heads")
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            dim,
            axis=(-2, -1),
            use_bias=out_bias,
            kernel_init=named(init, "heads", "head_dim", "embed"),
            bias_init=named(nnx.initializers.zeros, "embed"),
            rngs=rngs,
        )

        def norm() -> RMSNorm | None:
            if qk_norm is None:
                return None
            return RMSNorm(head_dim, epsilon=qk_norm, name="head_dim", rngs=rngs)

        self.query_norm = norm()
        self.key_norm = norm()
        self.group = num_heads // num_kv_heads
        self.causal = causal
        self.rope_theta = rope_theta
        self.rope_stretch = rope_stretch
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, dim]` -> `[B, T, dim]`."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope_theta is not None:
            query = rotary(query, self.rope_theta, self.rope_stretch)
            key = rotary(key, self.rope_theta, self.rope_stretch)
        if self.implementation != "einsum":
            chosen = self.implementation
            return self.out(
                ops.attention(query, key, value, causal=self.causal, implementation=chosen)
            )
        rows, length, heads, head_dim = query.shape
        grouped = query.reshape(rows, length, heads // self.group, self.group, head_dim)
        mixed = attend(grouped, key, value, self.causal)
        return self.out(mixed.reshape(rows, length, heads, head_dim))


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020).

    Args:
      dim: Width of the residual stream.
      hidden_dim: Width inside.
      rngs: Random streams.
    """

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()

        def linear(inputs: int, outputs: int, *names: str) -> nnx.Linear:
            kernel_init = named(init, *names)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=kernel_init, rngs=rngs)

        self.gate = linear(dim, hidden_dim, "embed", "mlp")
        self.up = linear(dim, hidden_dim, "embed", "mlp")
        self.down = linear(hidden_dim, dim, "mlp", "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., dim]` -> `[..., dim]`."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
