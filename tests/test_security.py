"""What may not happen: code from a checkpoint, names that lead elsewhere, ports for everybody."""

import ast
import os
import pickle
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_states import host_state_of, make_mesh, put

import shardtrain as st
from shardtrain.checkpoint import Checkpointer, leaves, manifest
from shardtrain.errors import CheckpointError
from shardtrain.launch import launch
from shardtrain.recovery.saved import _folder

PACKAGE = Path(st.__file__).parent
CAN_EXECUTE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def names_used(tree):
    """Modules imported, attributes and bare names called, and keywords given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (("import", alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "import", (node.module or "").split(".")[0]
        elif isinstance(node, ast.keyword):
            yield "keyword", node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield "call", node.func.id


def test_nothing_that_executes_what_it_reads():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        used = set(names_used(ast.parse(path.read_text("utf-8"))))
        bad = {name for kind, name in used if kind == "import" and name in CAN_EXECUTE}
        bad |= {name for kind, name in used if (kind, name) == ("keyword", "allow_pickle")}
        bad |= {name for kind, name in used if kind == "call" and name in ("eval", "exec")}
        if bad:
            found[path.relative_to(PACKAGE).as_posix()] = bad
    assert found == {
        "launch/worker.py": {"exec"},  # `shardtrain launch -- python -c CODE`: the user's own
    }


def test_the_search_itself_finds_what_it_looks_for():
    code = "import pickle.x\nfrom dill import y\nnp.load(f, allow_pickle=True)\neval(z)"
    assert set(names_used(ast.parse(code))) >= {
        ("import", "pickle"), ("import", "dill"), ("keyword", "allow_pickle"), ("call", "eval"),
    }  # fmt: skip


class Trap:
    """Unpickling one makes a file: had it been read, we would see it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".npz", ".ckpt", ".npy"])
def test_files_that_can_hold_code_are_refused_by_name_and_not_opened(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="can execute code"):
        st.restore(file)
    assert not (tmp_path / "sprung").exists()


def test_safetensors_are_read(tmp_path):
    weights = {"layer/kernel": np.arange(6.0).reshape(2, 3), "layer/bias": np.ones(3, np.float16)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    found = st.restore(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(found["layer"]["kernel"], weights["layer/kernel"])
    assert found["layer"]["bias"].dtype == np.float16
    assert set(st.restore(tmp_path / "model.safetensors", only="layer/bias")["layer"]) == {"bias"}
    with pytest.raises(CheckpointError, match="did you mean 'layer'"):
        st.restore(tmp_path / "model.safetensors", only="layers")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"torn\.safetensors"):
        st.restore(tmp_path / "torn.safetensors")


@pytest.fixture
def run(tmp_path, devices):
    state, plan = put(host_state_of(3), make_mesh(4, 2))
    with Checkpointer(tmp_path / "run", plan) as checkpointer:
        checkpointer.save(state)
    return tmp_path / "run"


def largest_file(step):
    return max(
        (p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_link_in_place_of_a_file_is_damage(run, tmp_path, what):
    victim = largest_file(run / "3")
    victim = victim if what == "file" else victim.parent
    elsewhere = tmp_path / "elsewhere"
    shutil.move(victim, elsewhere)
    victim.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic link"):
        st.restore(run)


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "state/../../x"])
def test_a_manifest_that_names_other_places_is_damage(run, name):
    part = run / "3" / manifest.FOLDER / "files-00000-of-00001.json"
    body = manifest._read(part)
    body["files"][name] = [1, 0]
    manifest._write(part, body)
    with pytest.raises(CheckpointError, match="outside of the step"):
        st.restore(run)


def test_leaves_with_hostile_names_stay_inside(tmp_path, devices):
    state = {"../../up": np.ones(3, np.float32), "/root": np.ones(2, np.float32)}
    keys = leaves.to_arrays(leaves.named_leaves({"params": state}))
    assert all(".." not in Path(key).parts and not Path(key).is_absolute() for key in keys)


def test_snapshots_are_for_this_user_only(tmp_path):
    folder = _folder(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    other = tmp_path / "planted"
    other.mkdir()
    folder.symlink_to(other)
    try:
        with pytest.raises(CheckpointError, match="another user"):
            _folder(tmp_path)
    finally:
        os.unlink(folder)


def test_the_launcher_meets_on_loopback(tmp_path, capfd):
    code = "import os; print(os.environ['SHARDTRAIN_COORDINATOR'].rpartition(':')[0])"
    launched = launch([sys.executable, "-c", code], num_processes=2, run_directory=tmp_path)
    assert launched == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[p0] 127.0.0.1", "[p1] 127.0.0.1"]


@pytest.mark.processes
def test_nothing_listens_on_all_interfaces(tmp_path, capfd):
    """In the kernel's own words; other systems have no such table.

    The coordinator is on loopback, gloo on the address of the host's name.
    """
    worker = Path(__file__).with_name("listen_worker.py")
    environ = os.environ | {"PYTHONPATH": str(worker.parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(worker)]
    assert launch(command, num_processes=1, run_directory=tmp_path, environ=environ) == 0
    assert capfd.readouterr().out == "[p0] listens [0]\n"
    assert launch(command, num_processes=2, run_directory=tmp_path, environ=environ) == 0
    out = capfd.readouterr().out
    found = [line.split()[1:] for line in out.splitlines() if "listens [0, 1]" in line]
    assert len(found) == 2
    addresses = [address for line in found for address in line[3:]]
    assert len(addresses) == (3 if sys.platform == "linux" else 0)  # coordinator, gloo, gloo
    assert all(address.strip("0") not in ("", "FFFF") for address in addresses), addresses
    loopback = ("0100007F", "0" * 16 + "FFFF00000100007F", "0" * 24 + "01000000")
    assert len(addresses) == 0 or any(address in loopback for address in found[0] + found[1])
