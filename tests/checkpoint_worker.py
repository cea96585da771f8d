"""One of two processes that save, restore and fail together; started by a test.

Usage: checkpoint_worker.py PROCESS_INDEX PORT OLD_RUN NEW_RUN. Prints one JSON object.
"""

import json
import os
import resource
import shutil
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
from checkpoint_states import Plan, State, abstract, bits, host_state_of
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardtrain.checkpoint import Checkpointer, MemorySnapshot, manifest, replica_divergence
from shardtrain.data import DataLoader, audit_first_batch
from shardtrain.errors import CheckpointError, DataError


def placed(step, mesh):
    """`state_of(step)`, of which each process makes only its own shards."""
    host = host_state_of(step)
    specs = State(
        PartitionSpec(),
        {"w": PartitionSpec("data", "tensor"), "b": PartitionSpec("tensor")},
        (),
        PartitionSpec(),
        None,
    )
    leaves, treedef = jax.tree.flatten(host)
    made = [
        make(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    ]
    return jax.tree.unflatten(treedef, made)


def make(leaf, sharding):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = np.asarray(jax.random.key_data(leaf))
        data = jax.make_array_from_callback(words.shape, sharding, lambda i: words[i])
        with jax.set_mesh(sharding.mesh):
            return jax.random.wrap_key_data(data)
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda i: leaf[i])


def same_shards(got, want):
    """Whether this process's shards hold the same bits."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(
        bits(a.data) == bits(b.data)
        for x, y in pairs
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )


def message(action):
    try:
        action()
    except (CheckpointError, DataError) as error:
        return str(error)
    return ""


def flip_bit_in_largest_file(step_directory):
    files = [p for p in (step_directory / "state" / "d").rglob("*") if p.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def save_and_restore(index, mesh, old_run, new_run, seen):
    plan = Plan(abstract(placed(0, mesh)))
    with Checkpointer(old_run, plan) as checkpointer:
        seen["from one process"] = same_shards(checkpointer.restore(), placed(3, mesh))
    lines = []
    with Checkpointer(new_run, plan, max_to_keep=None, report=lines.append) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(placed(step, mesh))
        checkpointer.wait()
        seen["saved"] = checkpointer.steps()
        multihost_utils.sync_global_devices("before damage")
        if index == 0:
            flip_bit_in_largest_file(checkpointer.directory / "3")
        multihost_utils.sync_global_devices("after damage")
        seen["fell back"] = same_shards(checkpointer.restore(), placed(2, mesh))
        seen["lines"] = lines
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        checkpointer.save(placed(4, mesh))
        seen["failed"] = message(checkpointer.wait)  # at once: this process ends within 150 s
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        seen["after failure"] = checkpointer.steps()
        seen["earlier intact"] = same_shards(checkpointer.restore(), placed(2, mesh))
        checkpointer.save(placed(5, mesh))
        checkpointer.wait()
        if index == 0:  # the one that also writes the header
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        checkpointer.save(placed(6, mesh))
        seen["failed on the first"] = message(checkpointer.wait)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        seen["last intact"] = same_shards(checkpointer.restore(), placed(5, mesh))
        seen["at the end"] = checkpointer.steps()


def unreadable(index, mesh, new_run, seen):
    """The newest step is good, but one process gets an error from its disk."""
    copied = Path(new_run).with_name("unreadable")
    if index == 0:
        shutil.copytree(new_run, copied)
    multihost_utils.sync_global_devices("copied")
    checksum = manifest._checksum

    def fail(path):
        if index == 1 and "5" in path.parts:
            raise OSError(5, "Input/output error", str(path))
        return checksum(path)

    manifest._checksum = fail
    with Checkpointer(copied, Plan(abstract(placed(0, mesh)))) as checkpointer:
        seen["read error"] = same_shards(checkpointer.restore(), placed(2, mesh))
    manifest._checksum = checksum


def not_shared(index, mesh, directory, seen):
    """Every process writes to a directory of its own, as with `/tmp` on two hosts."""
    checkpointer = Checkpointer(directory / f"split-{index}", Plan(abstract(placed(0, mesh))))
    seen["not shared"] = message(lambda: checkpointer.save(placed(1, mesh)))


def remember(index, mesh, directory, seen):
    """Snapshots in memory; each process has a directory of its own, as on two hosts."""
    snapshots = MemorySnapshot(directory / f"host-{index}", Plan(abstract(placed(0, mesh))))
    mine = snapshots.directory

    def step_after(damage, by):
        if index == by:
            damage()
        multihost_utils.sync_global_devices("snapshot damage")
        if snapshots.latest() is None:
            return message(snapshots.restore)
        state = snapshots.restore()
        return int(state.step) if same_shards(state, placed(int(state.step), mesh)) else "wrong"

    def save_both():
        for step in (1, 2):
            snapshots.save(placed(step, mesh))

    save_both()
    seen["all there"] = step_after(lambda: None, by=0)
    seen["host 1 lost"] = step_after(lambda: shutil.rmtree(mine), by=1)
    save_both()
    seen["own of 0 torn"] = step_after(lambda: (mine / "2.own").write_bytes(b"torn"), by=0)
    seen["its copy too"] = step_after(lambda: (mine / "2.peer").unlink(), by=1)
    save_both()
    seen["both hosts lost"] = step_after(lambda: shutil.rmtree(mine), by=index)


def watch(index, mesh, seen):
    state = placed(1, mesh)
    seen["healthy"] = [str(d) for d in replica_divergence(state)]
    b = state.params["b"]
    copies = []
    for position, shard in enumerate(b.addressable_shards):
        data = np.asarray(shard.data).copy()
        if index == 1 and position == 0:
            data.view(np.uint32)[0] ^= 1
        copies.append(jax.device_put(data, shard.device))
    odd = jax.make_array_from_single_device_arrays(b.shape, b.sharding, copies)
    seen["diverged"] = [str(d) for d in replica_divergence({"b": odd})]


def feed(index, mesh, seen):
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    columns = {"x": np.arange(40, dtype=np.float32)}
    loader = DataLoader(columns, 8, seed=1)
    seen["rows"] = loader.local_rows(sharding).tolist()
    seen["batch"] = [
        np.asarray(multihost_utils.process_allgather(loader.batch(s, sharding)["x"], tiled=True))
        .astype(int)
        .tolist()
        for s in range(5)
    ]
    seen["audit"] = message(lambda: audit_first_batch(loader.batch(0, sharding)))
    mine = np.arange(4, dtype=np.float32)  # the same on both: the classic mistake
    doubled = jax.make_array_from_process_local_data(sharding, mine)
    seen["doubled"] = message(lambda: audit_first_batch({"x": doubled}))


def main(index, port, old_run, new_run):
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
        address, 2, index, coordinator_bind_address=address, initialization_timeout=60
    )
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"))
    seen = {}
    save_and_restore(index, mesh, old_run, new_run, seen)
    unreadable(index, mesh, new_run, seen)
    not_shared(index, mesh, Path(new_run).parent, seen)
    remember(index, mesh, Path(new_run).parent, seen)
    watch(index, mesh, seen)
    feed(index, mesh, seen)
    print(json.dumps(seen), flush=True)
    multihost_utils.sync_global_devices("done")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)  # a normal exit would wait for the other process
    sys.stdout.flush()
    os._exit(0)
