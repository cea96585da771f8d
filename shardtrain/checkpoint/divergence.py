"""Do replicas still hold the same bits? Silent data corruption shows here first.

XLA takes copies of an array on several devices to be equal and never compares them. Each device
hashes its own shards; along the mesh axes that a leaf is replicated over, the largest and the
smallest hash must agree. All leaves are compared by one program; one bit per leaf leaves the
devices. A leaf that is sharded over all axes has no copy to compare with.
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
    by_mesh: dict[Any, dict[str, jax.Array]] = collections.defaultdict(dict)
    for name, leaf in named_leaves(state).items():
        if isinstance(leaf, jax.Array) and _replicated_axes(leaf.sharding):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = key_words(leaf)
            by_mesh[_placement(leaf).mesh][name] = leaf
    return tuple(d for mesh, named in by_mesh.items() for d in _diverged(mesh, named))


def has_replicas(abstract_state: Any) -> bool:
    """Whether any leaf has a second copy, so that there is something to compare.

    Args:
        abstract_state: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    return any(_replicated_axes(leaf.sharding) for leaf in named_leaves(abstract_state).values())


def _replicated_axes(sharding: Any) -> tuple[str, ...]:
    """Mesh axes, larger than 1, over which a leaf is copied."""
    if not isinstance(sharding, NamedSharding):
        return ()
    used = set(jax.tree.leaves(tuple(sharding.spec)))
    return tuple(a for a, n in sharding.mesh.shape.items() if n > 1 and a not in used)


def _placement(leaf: jax.Array) -> NamedSharding:
    assert isinstance(leaf.sharding, NamedSharding)  # only such leaves have copies to compare
    return leaf.sharding


def _diverged(mesh: Mesh, named: dict[str, jax.Array]) -> list[Divergence]:
    """Compare leaves of one mesh by one program: two at a time could wait for each other."""
    leaves = tuple(named.values())
    specs = tuple(_placement(leaf).spec for leaf in leaves)
    copied = tuple(_replicated_axes(leaf.sharding) for leaf in leaves)
    with jax.set_mesh(mesh):
        verdicts, tables = _compare(mesh, specs, copied)(leaves)
    found: list[Divergence] = []
    for number, name in enumerate(named):
        if jax.device_get(verdicts)[number]:
            found.extend(_name_devices(name, tables[number], mesh))
    return found


@functools.cache
def _compare(
    mesh: Mesh, specs: tuple[PartitionSpec, ...], copied: tuple[tuple[str, ...], ...]
) -> Any:
    """The compiled comparison for one layout; kept, so that each is traced once.

    Returns:
        leaves -> whether copies differ `[leaves]`, and per leaf `[devices, 3]`: shard number and
        the two hash lanes of that device's copy.
    """

    def one(shard: jax.Array, copied: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
        sharded = tuple(a for a in mesh.axis_names if a not in copied)
        shard = jax.device_put(shard, jax.memory.Space.Device)  # offloaded leaves lie on the host
        hashed = jnp.stack(lanes(words(shard), linear_index(shard.shape), jnp.uint32(0)))
        differs = jax.lax.pmax(hashed, copied) != jax.lax.pmin(hashed, copied)
        shard_number = jnp.uint32(jax.lax.axis_index(sharded)) if sharded else jnp.uint32(0)
        return jnp.any(differs), jnp.concatenate([shard_number[None], hashed])[None]

    def local(shards: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        differ, tables = zip(*map(one, shards, copied), strict=True)
        anywhere = jax.lax.pmax(jnp.stack(differ).astype(jnp.uint32), mesh.axis_names)
        return anywhere, tables

    out = (PartitionSpec(), tuple(PartitionSpec(mesh.axis_names) for _ in specs))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)
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
