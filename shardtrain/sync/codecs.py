"""Numbers as bytes and back: what really travels.

A codec turns blocks of float32 numbers into bytes. On the wire everything is `uint8`, scales
included: no compiler can widen it, and a byte count is a shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.algorithms import Float8, Int4, Int8, Sign

SCALE_BYTES = 4
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Codec:
    """Blocks of numbers as bytes.

    Args:
      block: Numbers per scale.
      bits: Bits per number.
      quantise: `x[..., block] -> (bytes[..., block * bits / 8], scale[...])`.
      restore: The inverse, with its rounding.
    """

    block: int
    bits: int
    quantise: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    restore: Callable[[jax.Array, jax.Array], jax.Array]

    def row_bytes(self, length: int) -> int:
        """Bytes of `length` numbers, a multiple of `block`."""
        return length * self.bits // 8 + length // self.block * SCALE_BYTES

    def encode(self, x: jax.Array) -> jax.Array:
        """`float32[P, L] -> uint8[P, row_bytes(L)]`."""
        rows, length = x.shape
        payload, scale = self.quantise(x.reshape(rows, length // self.block, self.block))
        scales = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint8)
        return jnp.concatenate([payload.reshape(rows, -1), scales.reshape(rows, -1)], axis=1)

    def decode(self, sent: jax.Array, length: int) -> jax.Array:
        """`uint8[P, row_bytes(L)] -> float32[P, L]`."""
        rows, blocks = sent.shape[0], length // self.block
        payload, scales = jnp.split(sent, [length * self.bits // 8], axis=1)
        scale = jax.lax.bitcast_convert_type(scales.reshape(rows, blocks, SCALE_BYTES), jnp.float32)
        return self.restore(payload.reshape(rows, blocks, -1), scale).reshape(rows, length)


def make_codec(compression: Any) -> Codec | None:
    """The codec of a compression; None where it does not send each number on its own."""
    if isinstance(compression, Int8):
        return Codec(compression.block_size, 8, _to_int8, _from_int8)
    if isinstance(compression, Int4):
        return Codec(compression.block_size, 4, _to_int4, _from_int4)
    if isinstance(compression, Float8):
        return Codec(compression.block_size, 8, _to_float8, _from_float8)
    if isinstance(compression, Sign):
        return Codec(compression.block_size, 1, _to_sign, _from_sign)
    return None


def _scaled(x: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    return x / jnp.where(scale == 0, 1.0, scale)[..., None], scale


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scaled, scale = _scaled(x, 127.0)
    return jax.lax.bitcast_convert_type(jnp.round(scaled).astype(jnp.int8), jnp.uint8), scale


def _from_int8(payload: jax.Array, scale: jax.Array) -> jax.Array:
    whole = jax.lax.bitcast_convert_type(payload, jnp.int8).astype(jnp.float32)
    return whole * scale[..., None]


def _to_int4(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scaled, scale = _scaled(x, 7.0)
    nibbles = (jnp.round(scaled) + 8).astype(jnp.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scale


def _from_int4(payload: jax.Array, scale: jax.Array) -> jax.Array:
    nibbles = jnp.stack([payload & 15, payload >> 4], axis=-1)
    whole = nibbles.reshape(*payload.shape[:-1], -1).astype(jnp.float32) - 8
    return whole * scale[..., None]


def _to_float8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scaled, scale = _scaled(x, _E4M3_MAX)
    return jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8), scale


def _from_float8(payload: jax.Array, scale: jax.Array) -> jax.Array:
    small = jax.lax.bitcast_convert_type(payload, jnp.float8_e4m3fn)
    return small.astype(jnp.float32) * scale[..., None]


def _to_sign(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.packbits(x >= 0, axis=-1), jnp.mean(jnp.abs(x), axis=-1)


def _from_sign(payload: jax.Array, scale: jax.Array) -> jax.Array:
    return (jnp.unpackbits(payload, axis=-1).astype(jnp.float32) * 2 - 1) * scale[..., None]
