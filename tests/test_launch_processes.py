"""Two real JAX processes with two CPU devices each, joined over gloo."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from shardtrain.launch import launch
from shardtrain.launch.environment import detect_layout

WORKER = str(pathlib.Path(__file__).with_name("launch_jax_worker.py"))
ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def start(tmp_path, *behaviours, **options):
    command = [sys.executable, WORKER, str(tmp_path), *behaviours]
    return launch(command, 2, 2, run_directory=tmp_path / "run", environ=ENVIRON, **options)


def test_kill_9_restarts_and_finishes_and_the_slow_process_is_named(tmp_path, capfd):
    assert start(tmp_path, "kill@1", "slow@1") == 0
    out, err = capfd.readouterr()
    assert "process 1 failed at step 2, phase 'data' (killed by SIGKILL)" in err
    assert "[p0] shardtrain launch: 2 processes, each drives 2 devices (4 total)" in out
    for process in (0, 1):
        assert f"[p{process}] result 8.0 on 4 devices" in out
        assert re.search(rf"\[p{process}\] process 1 is \d+\.\dx slower, in data loading", out)


def test_an_exception_in_one_worker_is_told_apart_from_its_consequences(tmp_path, capfd):
    assert start(tmp_path, "raise@1", max_restarts=0) == 1
    err = capfd.readouterr().err
    assert "phase 'data' (exit code 1) on " in err
    assert ": ValueError: boom on process 1\n" in err
    assert err.count("Traceback (most recent call last)") == 1


def test_who_sleeps_is_told_from_who_waits_in_a_collective_and_both_show_their_stacks(
    tmp_path, capfd
):
    limits = {"data": 2.0, "dispatch": 2.0, "wait": 2.0}
    assert start(tmp_path, "sleep@1", "none@0", hang_timeouts=limits) == 0
    err = capfd.readouterr().err
    assert "last reported step 2, phase 'data' (data loading)." in err
    assert re.search(
        r"No progress for \d+ s at step 2\. Process 0 is in phase '(dispatch|wait)'", err
    )
    assert "did not answer" not in err
    stacks = [tmp_path / "run" / "generation-0" / f"stacks-p{i}.txt" for i in (0, 1)]
    assert all("launch_jax_worker.py" in path.read_text() for path in stacks)


def test_processes_that_disagree_stop_before_training(tmp_path, capfd):
    assert start(tmp_path, "disagree@1", max_restarts=0) == 1
    assert "config: process 0 has 'lr=1', process 1 has 'lr=2'" in capfd.readouterr().err


JOIN = """
import socket
import jax
import shardtrain as st

layout = st.init_distributed(timeout=60)
exposed = []
if jax.process_index() == 0:
    with socket.socket() as other:  # what listens on all interfaces answers here too (Linux)
        exposed = [other.connect_ex(("127.0.0.2", int(layout.coordinator.rpartition(":")[2])))]
print("joined", jax.process_index(), jax.process_count(), jax.device_count(), exposed == [0])
"""


def slurm(index, job):
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index),
        "SLURM_STEP_NODELIST": "localhost",
    }  # fmt: skip


def openmpi(index, job):
    return {
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        "PMIX_NAMESPACE": "a" * (job % 40),
    }  # fmt: skip


def free_job(scheduler):
    """A job whose port nobody uses; the port follows from the name of the job."""
    for job in range(os.getpid(), os.getpid() + 40):
        coordinator = detect_layout(scheduler(0, job)).coordinator
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(coordinator.rpartition(":")[2]))):
                return job, coordinator
    raise AssertionError("40 ports are taken")


@pytest.mark.parametrize(
    ("scheduler", "title"), [(slurm, "SLURM"), (openmpi, "Open MPI")], ids=["slurm", "openmpi"]
)
def test_processes_of_a_scheduler_join_and_print_the_layout(scheduler, title):
    job, coordinator = free_job(scheduler)
    common = {**ENVIRON, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env={**common, **scheduler(index, job)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        said = [worker.communicate(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert said[0][0].splitlines() == [
        f"{title}: 2 processes; this is process 0, coordinator {coordinator}",
        "joined 0 2 4 False",
    ]
    assert said[1][0].splitlines() == ["joined 1 2 4 False"]


def test_sigterm_to_the_supervisor_stops_all_processes_at_one_step_with_42(tmp_path):
    code = (
        "import sys; from shardtrain.launch import launch\n"
        f"sys.exit(launch([sys.executable, {WORKER!r}, {str(tmp_path)!r}, 'preempt@1'], 2, 2, "
        f"run_directory={str(tmp_path / 'run')!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=ENVIRON
    )
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 42
    saved = [(tmp_path / f"saved-{i}").read_text() for i in (0, 1)]
    assert saved[0] == saved[1]
