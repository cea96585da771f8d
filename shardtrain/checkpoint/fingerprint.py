"""Fingerprint of arrays that does not depend on how they are sharded.

Each element is hashed together with its global index (murmur3 finaliser, Appleby 2011) and the
hashes are summed modulo 2**32. A modular sum is exact in any order, so every mesh, process count
and also plain numpy give the same 64 bits; one flipped bit anywhere changes them. The sum runs
where the data is: only two words per leaf leave the device.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.checkpoint.leaves import key_words, on_mesh_of

_CHUNK = 1 << 20  # elements hashed at a time on the host


def fingerprint(named: Mapping[str, Any]) -> dict[str, Any]:
    """Hash every leaf, one after another.

    Each hash is a program with collectives over the leaf's devices, and nothing orders two such
    programs: on CPU (virtual devices share a few threads; processes meet over gloo) several at
    once can wait for each other for ever. So each is finished before the next is started.

    Args:
        named: `{name: array}`; jax arrays (typed keys too) or anything numpy can hold.

    Returns:
        `{name: uint32[2]}`, to be turned into text by `as_text` when needed.
    """
    jax.block_until_ready([x for x in named.values() if isinstance(x, jax.Array)])
    return {name: jax.block_until_ready(_hash_leaf(name, x)) for name, x in named.items()}


def as_text(hashes: Mapping[str, Any]) -> dict[str, str]:
    """16 hex digits per leaf; waits for the device."""
    fetched = jax.device_get(dict(hashes))
    return {name: f"{int(h[0]):08x}{int(h[1]):08x}" for name, h in fetched.items()}


def _hash_leaf(name: str, leaf: Any) -> Any:
    salt = np.uint32(zlib.crc32(name.encode()))
    if not isinstance(leaf, jax.Array):
        return _hash_host(np.asarray(leaf), salt)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = key_words(leaf)
    with on_mesh_of(leaf):
        return _hash_device(leaf, salt)


@jax.jit
def _hash_device(x: jax.Array, salt: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)  # offloaded leaves lie in host memory
    return jnp.stack(lanes(words(x), linear_index(x.shape), salt))


def _hash_host(x: np.ndarray, salt: np.uint32) -> np.ndarray:
    flat = np.ascontiguousarray(x).reshape(-1)
    total = np.zeros(2, np.uint32)
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK]
        index = np.arange(start, start + piece.size, dtype=np.uint64).astype(np.uint32)
        total += np.stack(lanes(_host_words(piece), index, salt))
    return total


def lanes(values: list[Any], index: Any, salt: Any) -> list[Any]:
    """The two sums over hashed elements; for numpy and jax arrays alike."""
    mixed = _mix(index + salt)
    for word in values:
        mixed = _mix(word ^ mixed)
    second = (mixed ^ (mixed >> 15)) * np.uint32(0x9E3779B1)
    second = second ^ (second >> 13)
    return [mixed.sum(dtype=np.uint32), second.sum(dtype=np.uint32)]


def _mix(h: Any) -> Any:
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def linear_index(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of every element, modulo 2**32, uint32 of `shape`."""
    index = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return index


def words(x: jax.Array) -> list[jax.Array]:
    """The bits of each element as one or two uint32 arrays of the shape of `x`."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return words(x.real) + words(x.imag)
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits == 64:
        halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return [halves[..., 0], halves[..., 1]]
    unsigned = {4: jnp.uint4, 2: jnp.uint2, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
    return [jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)]


def _host_words(x: np.ndarray) -> list[np.ndarray]:
    if x.dtype.kind == "c":
        return _host_words(x.real.copy()) + _host_words(x.imag.copy())
    if x.dtype == np.bool_:
        return [x.astype(np.uint32)]
    if x.dtype.itemsize == 8:
        halves = x.view("<u4").reshape(-1, 2)
        return [halves[:, 0], halves[:, 1]]
    bits = x.view(f"<u{x.dtype.itemsize}").astype(np.uint32)
    return [bits & np.uint32((1 << jax.dtypes.itemsize_bits(x.dtype)) - 1)]
