"""Do replicas still hold the same bits? Silent data corruption shows here first.

XLA takes copies of an array on several devices to be equal and never compares them. Each device
hashes its own shards; along the mesh axes that a leaf is replicated over, the largest and the
smallest hash must agree. One number per leaf leaves the devices. A leaf that is sharded over all
axes has no copy to compare with.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardtrain.checkpoint.fingerprint import lanes, linear_index, words
from shardtrain.checkpoint.leaves import key_words, named_leaves


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Copies of one leaf that differ.

    Attributes:
        name: path of the leaf.
        devices: those whose copy differs from the majority of copies of the same shard; with two
            copies there is no majority, and both are named.
        copies: number of copies of that shard.
    """

    name: str
    devices: tuple[str, ...]
    copies: int

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.devices)} of {self.copies} copies differ"


def replica_divergence(state: Any) -> tuple[Divergence, ...]:
    """Compare the copies of every replicated leaf; all processes must call it together.

    Args:
        state: pytree of jax arrays on one mesh. Donation is not needed; nothing is changed.

    Returns:
        One entry per leaf and shard whose copies differ; empty when all is well. Leaves with no
        second copy are not checked.
    """
    hashes = {
        name: _hash_copies(leaf)
        for name, leaf in named_leaves(state).items()
        if isinstance(leaf, jax.Array) and _replicated_axes(leaf.sharding)
    }
    verdicts = jax.device_get({name: diverged for name, (diverged, _, _) in hashes.items()})
    found: list[Divergence] = []
    for name, diverged in verdicts.items():
        if diverged:
            found.extend(_name_devices(name, *hashes[name][1:]))
    return tuple(found)


def _replicated_axes(sharding: Any) -> tuple[str, ...]:
    """Mesh axes, larger than 1, over which a leaf is copied."""
    if not isinstance(sharding, NamedSharding):
        return ()
    used = set(jax.tree.leaves(tuple(sharding.spec)))
    return tuple(a for a, n in sharding.mesh.shape.items() if n > 1 and a not in used)


def _hash_copies(leaf: jax.Array) -> tuple[jax.Array, jax.Array, Mesh]:
    """Whether copies differ, `[devices, 3]` (shard number, two hash lanes), and their mesh."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = key_words(leaf)
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    with jax.set_mesh(mesh):
        return *_compare(mesh, sharding.spec, _replicated_axes(sharding))(leaf), mesh


@functools.cache
def _compare(mesh: Mesh, spec: PartitionSpec, copied: tuple[str, ...]) -> Any:
    """The compiled comparison for one placement; kept, so that each is traced once."""
    sharded = tuple(a for a in mesh.axis_names if a not in copied)

    def local(shard: jax.Array) -> tuple[jax.Array, jax.Array]:
        shard = jax.device_put(shard, jax.memory.Space.Device)  # offloaded leaves lie on the host
        hashed = jnp.stack(lanes(words(shard), linear_index(shard.shape), jnp.uint32(0)))
        differs = jax.lax.pmax(hashed, copied) != jax.lax.pmin(hashed, copied)
        anywhere = jax.lax.pmax(jnp.any(differs).astype(jnp.uint32), mesh.axis_names)
        shard_number = jnp.uint32(jax.lax.axis_index(sharded)) if sharded else jnp.uint32(0)
        return anywhere, jnp.concatenate([shard_number[None], hashed])[None]

    out = (PartitionSpec(), PartitionSpec(mesh.axis_names))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    return jax.jit(mapped)


def _name_devices(name: str, table: jax.Array, mesh: Mesh) -> list[Divergence]:
    """Which devices hold the odd copies; only run once something differs."""
    rows = np.asarray(multihost_utils.process_allgather(table, tiled=True))
    by_shard: dict[int, list[tuple[Any, tuple[int, int]]]] = collections.defaultdict(list)
    for device, (shard, first, second) in zip(mesh.devices.flat, rows.tolist(), strict=True):
        by_shard[shard].append((device, (first, second)))
    found = []
    for copies in by_shard.values():
        votes = collections.Counter(value for _, value in copies)
        if len(votes) == 1:
            continue
        majority, count = votes.most_common(1)[0]
        decided = count * 2 > len(copies)
        odd = [d for d, value in copies if not decided or value != majority]
        named = tuple(f"{d} (process {d.process_index})" for d in odd)
        found.append(Divergence(name, named, len(copies)))
    return found
