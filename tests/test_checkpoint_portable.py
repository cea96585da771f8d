"""Reading checkpoints without the model: numpy, description, safetensors."""

import io

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_states import State, bits, host_state, make_mesh, put
from rich.console import Console

from shardtrain.checkpoint import Checkpointer, export, inspect, restore, store
from shardtrain.errors import CheckpointError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with steps 3 and 9."""
    directory = tmp_path_factory.mktemp("portable") / "run"
    for step in (3, 9):
        state, plan = put(host_state(step, seed=step), make_mesh(4, 2))
        with Checkpointer(directory, plan) as checkpointer:
            checkpointer.save(state, {"loss": 1.5})
    return directory


def test_numpy_without_a_plan(run):
    want = host_state(9, seed=9)
    for path in (run, run / "9"):
        got = restore(path)
        assert int(got["step"]) == 9
        assert bits(got["params"]["layers.0"]["kernel"]) == bits(want.params["layers.0"]["kernel"])
        assert bits(got["params"]["odd/name"]) == bits(want.params["odd/name"])
        assert bits(got["params"]["half"]) == bits(want.params["half"])
        assert bits(got["rng"]) == bits(want.rng)
        assert got["extras"]["keys"].shape == (8, 4)
        assert got["extras"]["empty"].shape == (0, 4)
        assert bits(got["extras"]["special"]) == bits(want.extras["special"])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restore(run)))


def test_one_step_or_a_part_of_it(run):
    assert int(restore(run, step=3)["step"]) == 3
    part = restore(run, only="params/layers.0")
    assert list(part) == ["params"]
    assert sorted(part["params"]["layers.0"]) == ["bias", "kernel"]
    with pytest.raises(CheckpointError, match=r"nothing called 'parms'.*did you mean 'params'"):
        restore(run, only="parms")
    with pytest.raises(CheckpointError, match=r"no complete step 4 .*\[3, 9\]"):
        restore(run, step=4)


def test_inspect_says_what_where_and_whether_intact(run):
    seen = inspect(run)
    assert (seen.step, seen.steps, seen.problems) == (9, [3, 9], [])
    assert seen.header.mesh["axes"] == {"data": 4, "tensor": 2}
    assert seen.header.extra == {"loss": 1.5}
    assert str(seen.leaves["params/layers.0/kernel"]) == "float32[8,16]"
    assert seen.leaves["rng"].dtype == "key<fry>"
    assert "saved on data=4,tensor=2 (8 devices) (model=toy); intact" in str(seen)
    assert inspect(run / "3").step == inspect(run, step=3).step == 3
    screen = io.StringIO()
    Console(width=120, file=screen).print(seen)
    assert "params/odd%2Fname" in screen.getvalue()


def test_export_is_what_safetensors_reads(run, tmp_path):
    path = export(run, tmp_path / "model.safetensors")
    got = safetensors.numpy.load_file(path)
    want = host_state(9, seed=9).params
    assert sorted(got) == ["half", "layers.0/bias", "layers.0/kernel", "odd%2Fname"]
    assert bits(got["layers.0/kernel"]) == bits(want["layers.0"]["kernel"])
    assert got["half"].dtype == ml_dtypes.bfloat16
    assert bits(got["half"]) == bits(want["half"])
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["step"] == "9"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_export_of_another_part_and_of_what_cannot_be(run, tmp_path):
    path = export(run / "3", tmp_path / "moments.safetensors", only="opt_state/0/mu")
    assert "layers.0/kernel" in safetensors.numpy.load_file(path)
    with pytest.raises(CheckpointError, match=r"rng is key<fry>\[\], which safetensors cannot"):
        export(run, tmp_path / "all.safetensors", only=None)
    assert not (tmp_path / "all.safetensors").exists()


def test_wrong_places_are_explained(tmp_path, run):
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        inspect(tmp_path / "absent")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "readme").write_text("hi")
    with pytest.raises(CheckpointError, match=r"no complete step in .*holds: \['readme'\]"):
        restore(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"Did you mean .*portable.*/run\?"):
        restore(run.parent)


def test_many_leaves_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Streaming: no call to the store asks for more than one leaf."""
    state = State(np.int32(1), {str(i): np.full(4, i, np.float32) for i in range(5)}, (), (), ())
    placed, plan = put(state, make_mesh(2, 1))
    with Checkpointer(tmp_path / "run", plan) as checkpointer:
        checkpointer.save(placed)
    asked, load = [], store.load
    monkeypatch.setattr(store, "load", lambda d, t: asked.append(len(t)) or load(d, t))
    got = safetensors.numpy.load_file(export(tmp_path / "run", tmp_path / "m.safetensors"))
    assert asked == [1] * 5
    assert got["3"].tolist() == [3.0] * 4
