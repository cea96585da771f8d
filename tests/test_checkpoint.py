"""Checkpointer: what is saved comes back bit for bit on any mesh; what does not fit is refused."""

import asyncio
import concurrent.futures
import gc
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import (
    Plan,
    State,
    abstract,
    assert_same_bits,
    host_state,
    make_mesh,
    put,
)
from hypothesis import given, settings
from hypothesis import strategies as hst

import shardtrain
from shardtrain.checkpoint import Checkpointer, commit
from shardtrain.checkpoint import leaves as leaves_module
from shardtrain.errors import CheckpointError, RestoreMismatch

MESHES = [(4, 2), (8, 1), (2, 2), (1, 4), (2, 1), (1, 1)]


@pytest.fixture
def lines():
    return []


def small(step, mesh=(2, 1), value=0.0):
    """A tiny state for tests about steps and files rather than kinds of leaves."""
    state = State(
        step=np.int32(step),
        params={"w": np.arange(32, dtype=np.float32).reshape(8, 4) + value},
        opt_state=(),
        rng=jax.random.key(0),
        extras=None,
    )
    return put(state, make_mesh(*mesh))


# ---------------------------------------------------------------- round trips


@pytest.fixture(scope="module")
def saved_on_every_mesh(tmp_path_factory):
    root = tmp_path_factory.mktemp("meshes")
    for index, shape in enumerate(MESHES):
        state, plan = put(host_state(7), make_mesh(*shape))
        with Checkpointer(root / str(index), plan) as checkpointer:
            checkpointer.save(state)
    return root


@settings(max_examples=len(MESHES) ** 2, deadline=None)
@given(hst.sampled_from(range(len(MESHES))), hst.sampled_from(range(len(MESHES))))
def test_any_layout_restores_any_other_bit_for_bit(saved_on_every_mesh, source, target):
    want, plan = put(host_state(7), make_mesh(*MESHES[target]))
    with Checkpointer(saved_on_every_mesh / str(source), plan) as checkpointer:
        got = checkpointer.restore()
    assert_same_bits(got, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_report_names_both_meshes_and_the_commit(tmp_path, lines):
    state, plan = small(4, (4, 2))
    with Checkpointer(tmp_path, plan, report=lines.append) as checkpointer:
        checkpointer.save(state)
    _, plan = small(4, (2, 1))
    with Checkpointer(tmp_path, plan, report=lines.append) as checkpointer:
        checkpointer.restore()
    assert lines[0].startswith("checkpoint 4 committed (")
    assert lines[1] == (
        "restored step 4: saved on data=4,tensor=2 (8 devices), now data=2 (2 devices)"
    )


def test_host_leaves_come_back_as_they_were(tmp_path):
    state = State(np.int64(2), {"w": np.arange(3.0)}, (True, 7, 2.5), None, np.float16(1.5))
    with Checkpointer(tmp_path, Plan(state)) as checkpointer:
        checkpointer.save(state)
        got = checkpointer.restore()
    assert got.opt_state == (True, 7, 2.5)
    assert [type(x) for x in got.opt_state] == [bool, int, float]
    assert (got.params["w"].dtype, got.step.dtype) == (np.float64, np.int64)
    assert_same_bits(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, state))


def test_the_state_may_be_donated_right_after_save(tmp_path):
    state, plan = small(1, (4, 2))
    want = np.asarray(state.params["w"]).copy()

    consume = jax.jit(lambda params: jax.tree.map(lambda p: p * 0 - 1, params), donate_argnums=0)
    with Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(state)
        consume(state.params)
        assert state.params["w"].is_deleted()
        np.testing.assert_array_equal(checkpointer.restore().params["w"], want)


def test_a_plan_may_store_its_state_in_another_form(tmp_path):
    """Layers stacked on devices, one array per layer on disk."""
    mesh = make_mesh(2, 1)
    per_layer = {"0": np.full((8, 2), 1.0, np.float32), "1": np.full((8, 2), 2.0, np.float32)}
    form = State(np.int32(1), per_layer, (), jax.random.key(0), None)
    placed, _ = put(form, mesh)

    class Stacked(Plan):
        abstract_checkpoint = abstract(placed)

        def to_checkpoint(self, state):
            unstacked = {str(i): layer for i, layer in enumerate(state.params)}
            return State(state.step, unstacked, (), state.rng, None)

        def from_checkpoint(self, tree):
            stacked = jnp.stack([tree.params["0"], tree.params["1"]])
            return State(tree.step, stacked, (), tree.rng, None)

    state = State(placed.step, jnp.stack(list(placed.params.values())), (), placed.rng, None)
    with Checkpointer(tmp_path / "stacked", Stacked(None)) as checkpointer:
        checkpointer.save(state)
        np.testing.assert_array_equal(checkpointer.restore().params, state.params)
    with Checkpointer(tmp_path / "stacked", Plan(abstract(placed))) as checkpointer:
        assert_same_bits(checkpointer.restore(), placed)


def test_extra_is_kept_beside_the_state(tmp_path):
    state, plan = small(1)
    with Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(state, {"loader": {"seed": 3, "fingerprint": "ab"}, "loss": 1.25})
        checkpointer.restore()
        assert checkpointer.extra == {"loader": {"seed": 3, "fingerprint": "ab"}, "loss": 1.25}
        with pytest.raises(CheckpointError, match="must be JSON"):
            checkpointer.save(small(2)[0], {"function": print})


# ---------------------------------------------------------------- steps and directories


def test_steps_latest_and_retention(tmp_path):
    with Checkpointer(tmp_path, small(0)[1], max_to_keep=2) as checkpointer:
        assert (checkpointer.latest(), checkpointer.steps()) == (None, [])
        for step in (10, 20, 30):
            checkpointer.save(small(step)[0])
        checkpointer.wait()
        assert (checkpointer.latest(), checkpointer.steps()) == (30, [20, 30])
        assert int(checkpointer.restore(20).step) == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "30"]


def test_retention_keeps_the_newest_and_all_when_asked(tmp_path):
    for keep, want in ((1, [4]), (None, [2, 4])):
        directory = tmp_path / str(keep)
        with Checkpointer(directory, small(0)[1], max_to_keep=keep) as checkpointer:
            for step in (2, 4):
                checkpointer.save(small(step)[0])
            checkpointer.wait()
            assert checkpointer.steps() == want


def test_retention_never_costs_the_last_verified_step(tmp_path, monkeypatch):
    """The newer step is on disk, but reading it back fails; or it was never verified."""
    with Checkpointer(tmp_path, small(0)[1], max_to_keep=1) as checkpointer:
        checkpointer.save(small(2)[0])
        checkpointer.wait()
        with monkeypatch.context() as damaged:
            damaged.setattr(commit.manifest, "write_part", fail)
            checkpointer.save(small(4)[0])
            with pytest.raises(CheckpointError, match=r"saving step 4 .*Earlier steps are intact"):
                checkpointer.wait()
        assert checkpointer.steps() == [2]
        shutil.copytree(tmp_path / "2", tmp_path / "3")
        shutil.rmtree(tmp_path / "3" / "shardtrain")  # as a kill before the manifest leaves it
        assert int(checkpointer.restore().step) == 2
        checkpointer.save(small(6)[0])
        checkpointer.wait()
        assert checkpointer.steps() == [6]
    assert_same_bits(checkpointer.restore(), small(6)[0])


def fail(*_):
    raise OSError("Input/output error")


def test_relative_and_home_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    state, plan = small(1)
    for path in ("runs/a", "~/b"):
        with Checkpointer(path, plan) as checkpointer:
            checkpointer.save(state)
    assert (tmp_path / "runs/a/1").is_dir()
    assert (tmp_path / "home/b/1").is_dir()


def test_an_empty_directory_or_step_is_named(tmp_path):
    state, plan = small(1)
    with Checkpointer(tmp_path, plan) as checkpointer:
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpointer.restore()
        checkpointer.save(state)
        with pytest.raises(CheckpointError, match=r"no step 7 in .*complete steps: \[1\]"):
            checkpointer.restore(7)


def test_saving_the_same_step_twice_keeps_one(tmp_path, lines):
    state, plan = small(5)
    with Checkpointer(tmp_path, plan, report=lines.append) as checkpointer:
        checkpointer.save(state)
        checkpointer.save(state)
    assert lines[-1] == "checkpoint 5 is already there, with the same values"
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


def test_going_back_sets_later_steps_aside_and_saves(tmp_path, lines):
    _, plan = small(0)
    with Checkpointer(tmp_path, plan, report=lines.append) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(small(step)[0])
        checkpointer.restore(10)
        checkpointer.save(small(20, value=1.0)[0])
        checkpointer.wait()
        assert checkpointer.steps() == [10, 20]
        assert float(checkpointer.restore().params["w"][0, 0]) == 1.0
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["10", "20", "20.superseded", "30.superseded"]
    assert "saving step 20: the existing step 30 is now 30.superseded" in lines


def test_what_shardtrain_did_not_write_is_left_alone(tmp_path):
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "thesis.tex").write_text("years of work")
    (tmp_path / "notes.orbax-checkpoint-tmp").mkdir()
    state, plan = small(8)
    with Checkpointer(tmp_path, plan) as checkpointer:
        assert checkpointer.latest() is None
        with pytest.raises(CheckpointError, match="8 exists and is not a checkpoint"):
            checkpointer.save(state)
        checkpointer.save(small(9)[0])
    assert (tmp_path / "8" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "notes.orbax-checkpoint-tmp").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    state, plan = small(1)
    with (
        Checkpointer(tmp_path / "file", plan) as checkpointer,
        pytest.raises(CheckpointError, match=r"could not prepare the directory: .*file"),
    ):
        checkpointer.save(state)


def test_a_closed_checkpointer_can_go_on(tmp_path):
    """A notebook cell that is run again."""
    checkpointer = Checkpointer(tmp_path, small(0)[1])
    for step in (1, 2):
        with checkpointer:
            checkpointer.save(small(step)[0])
    assert checkpointer.steps() == [1, 2]


def test_a_failed_save_of_a_dropped_checkpointer_is_seen(tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(commit, "finish", fail)
    state, plan = small(1)
    checkpointer = Checkpointer(tmp_path, plan).__enter__()
    checkpointer.save(state)
    concurrent.futures.wait([checkpointer._pending[1]])
    del checkpointer
    gc.collect()
    assert "shardtrain: saving step 1 failed: the disk is full" in capfd.readouterr().err


# ---------------------------------------------------------------- what does not fit


def test_every_difference_is_listed_at_once_and_nothing_is_touched(tmp_path):
    state, plan = put(host_state(3), make_mesh(2, 1))
    with Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(state)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    params = dict(state.params)
    params["half"] = params["half"].astype(jnp.float32)
    params["layers_0"] = params.pop("layers.0")
    params["odd/name"] = params["odd/name"].T
    other = State(state.step, params, state.opt_state, jnp.zeros(2, jnp.uint32), state.extras)
    with Checkpointer(tmp_path, Plan(abstract(other), "larger")) as checkpointer:
        for attempt in (checkpointer.restore, lambda: checkpointer.save(other)):
            with pytest.raises(RestoreMismatch) as caught:
                attempt()
            text = str(caught.value)
            assert "(saved: {'model': 'toy'}; plan: {'model': 'larger'}): 7 of 23" in text
            assert "params/half: dtype bfloat16 in the checkpoint, float32 in the plan" in text
            assert "params/odd%2Fname: shape [3, 5] in the checkpoint, [5, 3] in the plan" in text
            assert "params/layers_0/bias: float32[16] in the plan, not in the checkpoint" in text
            assert "did you mean 'params/layers.0/bias'?" in text
            assert "rng: key<fry>[] in the checkpoint, uint32[2] in the plan" in text
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_another_kind_of_random_key_is_a_difference(tmp_path):
    state, plan = small(1)
    with Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(state)
    other = State(state.step, state.params, (), jax.random.key(0, impl="rbg"), None)
    with (
        Checkpointer(tmp_path, Plan(abstract(other))) as checkpointer,
        pytest.raises(RestoreMismatch, match="another kind of random key"),
    ):
        checkpointer.restore()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "bert"}, "leaf params/name: a str cannot be checkpointed"),
        ({"act": np.tanh}, "leaf params/act: a ufunc cannot be checkpointed"),
        ({"": np.zeros(2)}, "empty key"),
    ],
)
def test_leaves_that_cannot_be_saved_are_named(tmp_path, params, message):
    state, plan = small(1)
    bad = State(state.step, params, (), state.rng, None)
    with (
        Checkpointer(tmp_path, plan) as checkpointer,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpointer.save(bad)


def test_names_are_unique_or_refused():
    names = leaves_module.named_leaves({"a.b": 1, "a": {"b": 2}, "a/b": 3, "a%2Fb": 4})
    assert names == {"a/b": 2, "a%252Fb": 4, "a.b": 1, "a%2Fb": 3}
    keys = [leaves_module.storage_key(name) for name in names]
    assert len(set(keys)) == 4
    assert not any("." in key for key in keys)

    @jax.tree_util.register_pytree_with_keys_class
    class Twice:
        def tree_flatten_with_keys(self):
            key = jax.tree_util.DictKey("x")
            return [(key, 1), (key, 2)], None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls()

    with pytest.raises(CheckpointError, match="two leaves are both called 'x'"):
        leaves_module.named_leaves(Twice())


# ---------------------------------------------------------------- around the process


def test_save_and_restore_inside_a_running_event_loop(tmp_path):
    async def cell():
        state, plan = small(1)
        with Checkpointer(tmp_path, plan) as checkpointer:
            checkpointer.save(state)
            return checkpointer.restore()

    assert int(asyncio.run(cell()).step) == 1


def test_inside_a_mesh_context(tmp_path):
    state, plan = small(1, (4, 2))
    for context in (make_mesh(4, 2), make_mesh(2, 1)):
        with jax.set_mesh(context), Checkpointer(tmp_path, plan) as checkpointer:
            checkpointer.save(state)
            assert_same_bits(checkpointer.restore(), state)


def test_orbax_is_silent(tmp_path, capfd, caplog):
    state, plan = small(1)
    with caplog.at_level(logging.DEBUG), Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(state)
        checkpointer.restore()
    assert {r.name for r in caplog.records} <= {"shardtrain.checkpoint", "jax", "asyncio"} | {
        r.name for r in caplog.records if r.name.startswith("jax.")
    }
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


SCRIPT = """
    import os, sys
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    import numpy as np
    from checkpoint_states import State, make_mesh, put
    from shardtrain.checkpoint import Checkpointer, commit
    big = np.arange(8 << 20, dtype=np.float32).reshape(8, -1)
    state = State(np.int32(1), {{"w": big}}, (), jax.random.key(0), None)
    state, plan = put(state, make_mesh(2, 1))
    checkpointer = Checkpointer({directory!r}, plan)
    checkpointer.save(state)
"""


def run_script(body, directory):
    text = textwrap.dedent(SCRIPT).format(
        tests=str(Path(__file__).parent), directory=str(directory)
    )
    return subprocess.run(
        [sys.executable, "-c", text + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(shardtrain.__file__).parents[1])},
    )


@pytest.mark.parametrize("ending", ["", "sys.exit(0)"])
def test_a_script_that_ends_without_waiting_still_commits(tmp_path, ending):
    done = run_script(ending, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    with Checkpointer(tmp_path, small(0)[1]) as checkpointer:
        assert checkpointer.latest() == 1


def test_leaves_offloaded_to_host_memory(tmp_path):
    mesh = make_mesh(4, 2)
    host = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec("data"), memory_kind="pinned_host"
    )
    weights = jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), host)
    state = State(small(1, (4, 2))[0].step, {"w": weights}, (), (), ())
    with Checkpointer(tmp_path, Plan(abstract(state))) as checkpointer:
        checkpointer.save(state)
        got = checkpointer.restore()
    assert got.params["w"].sharding.memory_kind == "pinned_host"
    assert_same_bits(got, state)
