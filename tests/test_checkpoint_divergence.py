"""Fingerprints do not depend on the mesh; copies that differ are found and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import host_state, make_mesh, put
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.checkpoint import as_text, fingerprint, replica_divergence
from shardtrain.checkpoint.leaves import named_leaves

P = PartitionSpec


def reference_hash(data: bytes, salt: int) -> str:
    """The definition in plain Python integers, for float32."""

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    first = second = 0
    for index, word in enumerate(np.frombuffer(data, "<u4").tolist()):
        mixed = mix(word ^ mix((index + salt) & 0xFFFFFFFF))
        other = ((mixed ^ (mixed >> 15)) * 0x9E3779B1) & 0xFFFFFFFF
        first, second = first + mixed, second + (other ^ (other >> 13))
    return f"{first & 0xFFFFFFFF:08x}{second & 0xFFFFFFFF:08x}"


def test_the_fingerprint_is_its_definition():
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    salt = 0x8CDC1683  # crc32 of "x"
    want = reference_hash(values.tobytes(), salt)
    assert as_text(fingerprint({"x": values})) == {"x": want}
    for spec in (P(), P("data"), P("data", "tensor"), P(None, "tensor")):
        placed = jax.device_put(values, NamedSharding(make_mesh(4, 2), spec))
        assert as_text(fingerprint({"x": placed})) == {"x": want}


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4", "uint32", "bool"]


@pytest.mark.parametrize("dtype", [*DTYPES, "complex64"])
def test_every_dtype_hashes_alike_on_host_and_mesh(dtype):
    values = (np.random.default_rng(1).normal(size=(8, 4)) * 3).astype(jnp.dtype(dtype))
    placed = jax.device_put(values, NamedSharding(make_mesh(4, 2), P("data", "tensor")))
    assert as_text(fingerprint({"x": placed})) == as_text(fingerprint({"x": values}))


def test_64_bit_host_arrays_hash_both_halves():
    one, two = np.array([1, 2, 3]), np.array([1, 2 + 2**40, 3])
    assert as_text(fingerprint({"x": one})) != as_text(fingerprint({"x": two}))


def test_swapped_elements_and_names_change_it():
    base = as_text(fingerprint({"x": np.array([1.0, 2.0], np.float32)}))["x"]
    assert as_text(fingerprint({"x": np.array([2.0, 1.0], np.float32)}))["x"] != base
    assert as_text(fingerprint({"y": np.array([1.0, 2.0], np.float32)}))["y"] != base


def with_flipped_bit(array, device, dtype=np.uint32):
    """The same global array, but for one bit in the copy on one device."""
    copies = []
    for shard in array.addressable_shards:
        data = np.asarray(shard.data).copy()
        if shard.device == device:
            data.view(dtype).flat[0] ^= 1
        copies.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)


def test_a_healthy_state_has_no_divergence():
    state, _ = put(host_state(), make_mesh(4, 2))
    assert replica_divergence(state) == ()


@pytest.mark.parametrize(
    ("spec", "dtype", "copies"),
    [
        (P(), "float32", 8),
        (P(None, "tensor"), "float32", 4),
        (P("data"), "float32", 2),
        (P(), "bfloat16", 8),
    ],
)
def test_one_flipped_bit_in_one_copy_names_leaf_and_device(spec, dtype, copies):
    mesh = make_mesh(4, 2)
    values = np.arange(32).reshape(8, 4).astype(jnp.dtype(dtype))
    array = jax.device_put(values, NamedSharding(mesh, spec))
    word = np.uint32 if dtype == "float32" else np.uint16
    state = {"fine": array, "layer": {"w": with_flipped_bit(array, jax.devices()[5], word)}}
    [found] = replica_divergence(state)
    assert (found.name, found.copies) == ("layer/w", copies)
    named = f"{jax.devices()[5]} (process 0)"
    # with two copies nobody can tell which one is wrong
    assert named in found.devices
    assert len(found.devices) == (2 if copies == 2 else 1)


def test_a_fully_sharded_leaf_has_nothing_to_compare_with():
    array = jax.device_put(
        np.zeros((8, 4), np.float32), NamedSharding(make_mesh(4, 2), P("data", "tensor"))
    )
    assert replica_divergence({"w": with_flipped_bit(array, jax.devices()[1])}) == ()


def test_under_another_mesh_context():
    state, _ = put(host_state(), make_mesh(4, 2))
    with jax.set_mesh(make_mesh(2, 1)):
        assert replica_divergence(state) == ()
        assert len(fingerprint(named_leaves(state))) == 21
