"""Snapshots in memory, one process; two processes are in test_checkpoint_processes."""

import jax
import pytest
from checkpoint_states import (
    Plan,
    State,
    abstract,
    assert_same_bits,
    host_state,
    make_mesh,
    plan,
    put,
    state_of,
)

from shardtrain.checkpoint import MemorySnapshot
from shardtrain.errors import CheckpointError


def test_every_kind_of_leaf_comes_back_on_its_sharding(tmp_path):
    state, snapshot_plan = put(host_state(7), make_mesh(4, 2))
    snapshots = MemorySnapshot(tmp_path, snapshot_plan)
    snapshots.save(state)
    got = snapshots.restore()
    assert_same_bits(got, state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_newest_two_are_kept_and_a_torn_one_is_skipped(tmp_path):
    snapshots = MemorySnapshot(tmp_path, plan())
    assert snapshots.latest() is None
    for step in (1, 2, 3):
        snapshots.save(state_of(step)[0])
    files = sorted(p.name for p in (tmp_path / "process-0").iterdir())
    assert (snapshots.latest(), files) == (3, ["2.own", "3.own"])
    newest = tmp_path / "process-0" / "3.own"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert_same_bits(snapshots.restore(), state_of(2)[0])
    newest.write_bytes(data[:20])
    assert snapshots.latest() == 2
    with pytest.raises(CheckpointError, match="keep must be at least 2, got 1"):
        MemorySnapshot(tmp_path, plan(), keep=1)


def test_a_rolled_back_future_is_forgotten(tmp_path):
    snapshots = MemorySnapshot(tmp_path, plan())
    for step in (8, 9, 5):
        snapshots.save(state_of(step)[0])
    assert snapshots.latest() == 5


def test_another_layout_finds_nothing_and_says_so(tmp_path):
    MemorySnapshot(tmp_path, plan()).save(state_of(1)[0])
    other, other_plan = put(host_state(1), make_mesh(2, 1))
    snapshots = MemorySnapshot(tmp_path, other_plan)
    with pytest.raises(CheckpointError, match=r"no whole snapshot of this layout.*from disk"):
        snapshots.restore()
    with pytest.raises(CheckpointError, match="does not have the shapes and shardings"):
        MemorySnapshot(tmp_path, plan()).save(other)


def test_a_state_off_the_mesh_is_refused(tmp_path):
    state = State(jax.numpy.int32(1), {"w": jax.numpy.ones(3)}, (), (), ())
    with pytest.raises(CheckpointError, match="leaf step is not on a mesh"):
        MemorySnapshot(tmp_path, Plan(abstract(state)))
