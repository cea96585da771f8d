"""Two real processes over gloo: they agree, or all raise; and what they save one process reads."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from checkpoint_states import assert_same_bits, plan, state_of

import shardtrain
from shardtrain.checkpoint import Checkpointer, inspect

pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "checkpoint_worker.py"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Everything the two processes saw, and the run directory they wrote."""
    root = tmp_path_factory.mktemp("processes")
    with Checkpointer(root / "old", plan()) as checkpointer:
        checkpointer.save(state_of(3)[0])
    env = os.environ | {
        "PYTHONPATH": str(Path(shardtrain.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    command = [str(free_port()), str(root / "old"), str(root / "new")]
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(index), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for index in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=150) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, err) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, err[-3000:]
    return root / "new", [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_both_restore_what_one_process_saved_and_save_together(run):
    for seen in run[1]:
        assert seen["from one process"]
        assert seen["saved"] == [1, 2, 3]


def test_one_process_reads_what_two_saved(run):
    with Checkpointer(run[0], plan()) as checkpointer:
        assert_same_bits(checkpointer.restore(), state_of(5)[0])
    header = inspect(run[0]).header
    assert (header.num_parts, header.mesh["processes"]) == (2, 2)
    assert inspect(run[0]).problems == []


def test_both_fall_back_to_the_same_step(run):
    for seen in run[1]:
        assert seen["fell back"]
    assert any("renamed to 3.corrupt" in line for line in run[1][0]["lines"])
    assert (run[0] / "3.corrupt").is_dir()


def test_a_save_that_fails_on_one_process_fails_on_both_and_the_next_works(run):
    first, second = run[1]
    assert "saving step 4" in first["failed"]
    assert "the disk is full or a size limit was reached" in second["failed"]
    assert "the disk is full or a size limit was reached" in first["failed on the first"]
    assert "saving step 6" in second["failed on the first"]
    for seen in run[1]:
        assert seen["after failure"] == [1, 2]
        assert seen["earlier intact"]
        assert seen["last intact"]
        assert seen["at the end"] == [1, 2, 5]


def test_a_read_error_on_one_process_makes_both_use_the_step_before(run):
    for seen in run[1]:
        assert seen["read error"]
    assert (run[0].with_name("unreadable") / "5.corrupt").is_dir()


def test_a_directory_that_is_not_shared_is_named_with_the_blind_processes(run):
    for seen in run[1]:
        assert "is not shared: processes [1] cannot see what process 0 wrote" in seen["not shared"]
    assert list((run[0].parent / "split-0").iterdir()) == []


def test_memory_snapshots_survive_one_lost_host_but_not_two(run):
    for seen in run[1]:
        assert seen["all there"] == 2
        assert seen["host 1 lost"] == 2
        assert seen["own of 0 torn"] == 2
        assert seen["its copy too"] == 1
        assert "no whole snapshot of this layout" in seen["both hosts lost"]


def test_divergence_across_processes_names_the_copies(run):
    for seen in run[1]:
        assert seen["healthy"] == []
        [found] = seen["diverged"]
        assert found.startswith("b: ")
        assert "(process 1)" in found


def test_each_process_reads_its_rows_and_the_epoch_is_complete(run):
    assert [seen["rows"] for seen in run[1]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    batches = run[1][0]["batch"]
    assert run[1][1]["batch"] == batches
    assert sorted(x for batch in batches for x in batch) == list(range(40))


def test_the_audit_passes_good_input_and_catches_the_classic_mistake(run):
    for seen in run[1]:
        assert seen["audit"] == ""
        assert "processes 0 and 1 own different rows" in seen["doubled"]
