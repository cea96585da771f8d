"""Damage done on purpose: a wrong state is never restored, and nothing good is lost."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_states import assert_same_bits, plan, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hst

import shardtrain
from shardtrain.checkpoint import Checkpointer, inspect, manifest, restore, store
from shardtrain.errors import CheckpointError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run with the good steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("pristine") / "run"
    with Checkpointer(directory, plan(), max_to_keep=None) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(state_of(step)[0])
    return directory


@pytest.fixture
def run(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


def restored_step(directory, lines=None):
    """Restore the newest good step and check every bit of it."""
    report = None if lines is None else lines.append
    with Checkpointer(directory, plan(), report=report) as checkpointer:
        state = checkpointer.restore()
    assert_same_bits(state, state_of(int(state.step))[0])
    return int(state.step)


def files_of(step_directory):
    return sorted(p for p in step_directory.rglob("*") if p.is_file())


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=hst.integers(0, 30), position=hst.integers(0, 1 << 20), bit=hst.integers(0, 7))
def test_any_flipped_bit_is_found_and_the_step_before_is_used(pristine, file, position, bit):
    run = pristine.parent / "flipped"
    shutil.copytree(pristine, run)
    try:
        files = [p for p in files_of(run / "3") if p.stat().st_size]
        flip(files[file % len(files)], position, bit)
        assert restored_step(run) == 2
        assert len([p for p in run.iterdir() if p.name.startswith("3")]) == 1
    finally:
        shutil.rmtree(run)


def every_file():
    """Relative names of the files of a step; the same for every step of this tiny state."""
    return ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "largest"]


@pytest.mark.parametrize("name", every_file())
@pytest.mark.parametrize("damage", ["truncate", "delete", "zero", "grow"])
def test_truncated_deleted_zeroed_and_grown_files(run, name, damage):
    files = files_of(run / "3" / "state" / "d") or files_of(run / "3")
    path = max(files, key=lambda p: p.stat().st_size) if name == "largest" else run / "3" / name
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(
            {"truncate": data[: len(data) // 2], "zero": bytes(len(data)), "grow": data + b"\0"}[
                damage
            ]
        )
    lines = []
    assert restored_step(run, lines) == 2
    assert (run / "3.corrupt").is_dir()
    assert lines[0].startswith("checkpoint 3 is damaged (")
    assert lines[0].endswith("renamed to 3.corrupt")


@pytest.mark.parametrize("keep", ["state", "shardtrain", "nothing"])
def test_a_half_deleted_step_is_never_used(run, keep):
    for path in list((run / "3").iterdir()):
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert restored_step(run) == 2
    with Checkpointer(run, plan()) as checkpointer:
        assert checkpointer.latest() == 2
        checkpointer.save(state_of(3)[0])
    assert restored_step(run) == 3


def test_damage_that_only_the_array_store_notices_falls_back_too(run, monkeypatch):
    """What TensorStore says when a B-tree node fails its checksum (text as seen, shortened)."""
    load = store.load

    def refusing(directory, targets):
        if directory.name == "3":
            raise ValueError("DATA_LOSS: Error decoding b-tree node: CRC-32C verification failed")
        return load(directory, targets)

    monkeypatch.setattr(store, "load", refusing)
    lines = []
    assert restored_step(run, lines) == 2
    assert "the arrays were written damaged: DATA_LOSS" in lines[0]


def test_a_load_that_fails_for_another_reason_is_not_taken_for_damage(run, monkeypatch):
    def full(directory, targets):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory on device 3")

    monkeypatch.setattr(store, "load", full)
    with pytest.raises(CheckpointError, match="3 is intact but could not be loaded: RESOURCE"):
        restored_step(run)
    assert (run / "3").is_dir()


def test_values_that_changed_under_a_valid_checksum_are_found(run):
    """As if the data had been wrong before they reached the disk."""
    block = np.asarray(state_of(3)[0].params["w"].addressable_shards[0].data).tobytes()
    [path] = [p for p in files_of(run / "3") if block in p.read_bytes()]
    flip(path, path.read_bytes().index(block) + 10, bit=4)
    manifest.write_part(run / "3", 0, 1)
    assert manifest.problems(run / "3") == []
    lines = []
    assert restored_step(run, lines) == 2
    assert "values changed since they were saved (fingerprint " in lines[0]


def test_several_bad_steps_in_a_row_and_saving_on(run):
    for step in (2, 3):
        flip(files_of(run / str(step) / "state" / "d")[0], 40)
    with Checkpointer(run, plan()) as checkpointer:
        assert int(checkpointer.restore().step) == 1
        checkpointer.save(state_of(2)[0])
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
    assert sorted(p.name for p in run.iterdir()) == ["1", "2", "2.corrupt", "3.corrupt"]


def test_nothing_good_left_says_what_is_wrong_with_each_and_keeps_all(run):
    for step in (1, 2, 3):
        flip(files_of(run / str(step) / "state" / "d")[0], 40)
    with (
        Checkpointer(run, plan()) as checkpointer,
        pytest.raises(CheckpointError, match=r"no good step.*step 3: .*step 2: .*step 1: ") as info,
    ):
        checkpointer.restore()
    assert "renamed to *.corrupt, not deleted" in str(info.value)
    assert sorted(p.name for p in run.iterdir()) == ["1.corrupt", "2.corrupt", "3.corrupt"]


def test_a_damaged_step_asked_for_by_number_is_refused_and_left(run):
    path = files_of(run / "2" / "state" / "d")[0]
    flip(path, 40)
    with (
        Checkpointer(run, plan()) as checkpointer,
        pytest.raises(
            CheckpointError, match=r"step 2 in .* is damaged and was not restored: state"
        ),
    ):
        checkpointer.restore(2)
    assert (run / "2").is_dir()
    with pytest.raises(CheckpointError, match=r"2 is damaged: state.* steps: \[1, 3\]"):
        restore(run, step=2)
    assert inspect(run, step=2).problems[0].startswith(path.relative_to(run / "2").as_posix())


def test_a_newer_format_is_refused_by_name(run):
    header = manifest.read_header(run / "3").to_json() | {"format": 2}
    manifest._write(run / "3" / "shardtrain" / "header.json", header)
    with pytest.raises(CheckpointError, match="has format 2, this shardtrain reads 1"):
        manifest.read_header(run / "3")


def test_leftovers_of_a_killed_save_go_at_the_next_one(run):
    (run / "4.orbax-checkpoint-tmp").mkdir()
    (run / "1.deleting").mkdir()
    assert restored_step(run) == 3
    assert (run / "4.orbax-checkpoint-tmp").exists()
    with Checkpointer(run, plan(), max_to_keep=None) as checkpointer:
        checkpointer.save(state_of(4)[0])
    assert sorted(p.name for p in run.iterdir()) == ["1", "2", "3", "4"]


# ---------------------------------------------------------------- other processes that die or fail

PRELUDE = """
    import os, resource, sys, time
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from checkpoint_states import plan, state_of
    from shardtrain.checkpoint import Checkpointer
    from shardtrain.errors import CheckpointError

    def limit_file_size(count):
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, resource.RLIM_INFINITY))

    checkpointer = Checkpointer({directory!r}, plan(), max_to_keep=None)
"""


CHILD = {
    "PYTHONPATH": str(Path(shardtrain.__file__).parents[1]),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def start(body, directory):
    tests = str(Path(__file__).parent)
    text = textwrap.dedent(PRELUDE).format(tests=tests, directory=str(directory))
    return subprocess.Popen(
        [sys.executable, "-c", text + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | CHILD,
    )


def test_a_full_disk_is_told_at_once_and_the_next_save_works(tmp_path):
    body = """
        with checkpointer:
            checkpointer.save(state_of(1)[0])
            checkpointer.wait()
            limit_file_size(600)
            checkpointer.save(state_of(2)[0])
            told = None
            for _ in range(1000):
                time.sleep(0.02)
                try:
                    checkpointer.poll()
                except CheckpointError as error:
                    told = str(error)
                    break
            print(told)
            limit_file_size(resource.RLIM_INFINITY)
            print(sorted(os.listdir(checkpointer.directory)))
            checkpointer.save(state_of(3)[0])
            checkpointer.wait()
            print(checkpointer.steps())
        checkpointer = Checkpointer(checkpointer.directory, plan())
        limit_file_size(600)
        checkpointer.save(state_of(4)[0])
    """
    process = start(body, tmp_path)
    out, err = process.communicate(timeout=120)
    told, listing, steps = out.splitlines()
    assert told.startswith(f"saving step 2 to {tmp_path} failed: the disk is full or a size limit")
    assert told.endswith("Earlier steps are intact.")
    assert (listing, steps) == ("['1']", "[1, 3]")
    # the program ended while step 4 could not be written: that must not look like success
    assert process.returncode == 1
    assert f"saving step 4 to {tmp_path} failed: the disk is full" in err
    assert restored_step(tmp_path) == 3


@pytest.mark.parametrize("delay", [0.0, 0.06])
def test_kill_9_during_saves_loses_nothing_that_was_reported(tmp_path, delay):
    body = """
        for step in range(1, 10_000):
            checkpointer.save(state_of(step)[0])
            if step > 2:
                print(step - 1, flush=True)
    """
    process = start(body, tmp_path)
    try:
        reported = int(process.stdout.readline())
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=30)[0].split()
    reported = max([reported, *map(int, rest)])
    step = restored_step(tmp_path)
    assert step in (reported, reported + 1)
    with Checkpointer(tmp_path, plan(), max_to_keep=2) as checkpointer:
        checkpointer.save(state_of(step + 1)[0])
    assert restored_step(tmp_path) == step + 1


def test_a_manifest_that_names_files_elsewhere_is_refused(run):
    part = run / "3" / "shardtrain" / "files-00000-of-00001.json"
    files = manifest._read(part)["files"] | {"../../../etc/passwd": [1, 2]}
    manifest._write(part, {"files": files})
    assert manifest.problems(run / "3") == [
        "the manifest names a file outside of the step: '../../../etc/passwd'"
    ]
    assert restored_step(run) == 2
