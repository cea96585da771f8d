"""The inside of a worker and the pure parts of the launcher: no JAX, few processes."""

import json
import signal
import subprocess
import sys

import pytest

from shardtrain.errors import DistributedError
from shardtrain.launch import worker
from shardtrain.launch.command import worker_command, worker_environment
from shardtrain.launch.gpus import gpu_share, visible_gpus
from shardtrain.launch.outcome import Exit, Generation, Restart, Stop, next_action
from shardtrain.monitoring import PREEMPTED_EXIT_CODE, progress


class JaxRuntimeError(RuntimeError):
    """Same name as JAX's, which is what counts."""


def test_the_two_stand_alone_copies_of_names_agree():
    assert worker.RUN_DIRECTORY_VARIABLE == progress.RUN_DIRECTORY_VARIABLE
    assert worker.PROCESS_INDEX_VARIABLE == progress.PROCESS_INDEX_VARIABLE
    assert worker.EXIT_PREEMPTED == PREEMPTED_EXIT_CODE


# ------------------------------------------------------------------------------ exit codes


def chained():
    try:
        raise JaxRuntimeError("UNAVAILABLE: Gloo all-reduce failed: Connection reset by peer")
    except JaxRuntimeError as error:
        raise ValueError("step 3 failed") from error


def test_exit_codes():
    assert worker.exit_code(ValueError("no heartbeat in this patient")) == 1
    assert worker.exit_code(JaxRuntimeError("Gloo ... Connection reset by peer")) == 17
    assert worker.exit_code(JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) == 1
    with pytest.raises(ValueError, match="step 3") as caught:
        chained()
    assert worker.exit_code(caught.value) == 17
    assert worker.exit_code(SystemExit(42)) == 42
    assert worker.exit_code(SystemExit(None)) == 0
    assert worker.exit_code(SystemExit("usage")) == 1
    assert worker.exit_code(KeyboardInterrupt()) == 130


def run_worker(code, tmp_path, **environ):
    command = [sys.executable, worker.__file__, "-c", code, "argument"]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environ},
        cwd=tmp_path,
    )


def test_a_worker_reports_and_leaves_with_its_code(tmp_path):
    code = "import atexit, time; atexit.register(time.sleep, 60); print('hi'); raise KeyError('x')"
    done = run_worker(
        code, tmp_path, SHARDTRAIN_RUN_DIRECTORY=str(tmp_path), SHARDTRAIN_PROCESS_INDEX="3"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "hi\n", "")
    report = json.loads((tmp_path / "report-p3.json").read_text())
    assert (report["type"], report["message"], report["code"]) == ("KeyError", "'x'", 1)
    assert report["traceback"].startswith(
        'Traceback (most recent call last):\n  File "<string>", line 1, in <module>'
    )


def test_without_a_supervisor_the_traceback_is_printed(tmp_path):
    done = run_worker("raise KeyError('x')", tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'x'\n")


def test_a_broken_collective_is_one_line_and_17(tmp_path):
    code = (
        "class JaxRuntimeError(RuntimeError): pass\n"
        "raise JaxRuntimeError('Gloo all-reduce failed: Connection reset by peer\\nmore')"
    )
    done = run_worker(code, tmp_path, SHARDTRAIN_RUN_DIRECTORY=str(tmp_path))
    assert done.returncode == 17
    assert done.stderr == (
        "stopping because another process failed: Gloo all-reduce failed: Connection reset by "
        "peer\n"
    )


@pytest.mark.parametrize(
    ("code", "returncode", "stderr"),
    [
        ("import sys; assert sys.argv == ['-c', 'argument']; sys.exit()", 0, ""),
        ("import atexit; atexit.register(print, 'normal end')", 0, ""),
        ("raise SystemExit('bad usage')", 1, "bad usage\n"),
    ],
)
def test_other_endings(tmp_path, code, returncode, stderr):
    done = run_worker(code, tmp_path, SHARDTRAIN_RUN_DIRECTORY=str(tmp_path))
    assert (done.returncode, done.stderr) == (returncode, stderr)
    assert ("normal end" in done.stdout) == ("normal end" in code)


def test_scripts_and_modules_run_as_main(tmp_path):
    (tmp_path / "helper.py").write_text("value = 7\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, helper\nassert __name__ == '__main__'\n"
        "print(sys.argv[1:], helper.value, __file__)\n"
    )
    for head in ([str(script)], ["-m", "train"]):
        done = subprocess.run(
            [sys.executable, worker.__file__, *head, "--lr=1"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=tmp_path,
        )
        assert done.stdout == f"['--lr=1'] 7 {script}\n"


# ------------------------------------------------------------------------------ commands


def test_worker_commands(tmp_path):
    entry = worker.__file__
    assert worker_command(["train.py", "a"]) == [sys.executable, entry, "train.py", "a"]
    assert worker_command([sys.executable, "-u", "-W", "error", "-m", "pkg"]) == [
        sys.executable, "-u", "-W", "error", entry, "-m", "pkg",
    ]  # fmt: skip
    tool = tmp_path / "tool"
    tool.write_text(f"#!{sys.executable}\nprint(1)\n")
    tool.chmod(0o755)
    assert worker_command([str(tool), "x"]) == [sys.executable, entry, str(tool), "x"]
    assert worker_command(["/bin/sh", "-c", "true"])[2:] == ["--exec", "/bin/sh", "-c", "true"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "nothing to launch"),
        ([sys.executable], "without a program"),
        (["no-such-program-here"], "not found on PATH"),
    ],
)
def test_bad_commands(command, message):
    with pytest.raises(DistributedError, match=message):
        worker_command(command)


def environment(tmp_path, gpus=(), devices=None, **environ):
    return worker_environment(
        environ,
        process_index=1,
        process_count=2,
        devices_per_process=devices,
        coordinator="127.0.0.1:1",
        run_directory=tmp_path,
        gpus=gpus,
    )


def test_devices_are_virtual_cpus_or_a_share_of_the_gpus(tmp_path):
    cpu = environment(tmp_path, devices=2, no_proxy="corp", https_proxy="proxy:80")
    assert (cpu["JAX_NUM_CPU_DEVICES"], cpu["JAX_PLATFORMS"]) == ("2", "cpu")
    assert cpu["no_proxy"] == "corp,127.0.0.1,localhost"
    gpu = environment(tmp_path, gpus=("0", "1", "2", "3"))
    assert gpu["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "JAX_NUM_CPU_DEVICES" not in gpu
    assert "JAX_NUM_CPU_DEVICES" not in environment(tmp_path)
    assert "no_proxy" not in environment(tmp_path)
    assert gpu_share(["0", "1", "2"], 1, 3, None) == ["1"]
    with pytest.raises(DistributedError, match=r"an equal share of the 3 .* counts: \[1, 3\]"):
        gpu_share(["0", "1", "2"], 0, 2, None)
    with pytest.raises(DistributedError, match="2 GPUs each of the 3"):
        gpu_share(["0", "1", "2"], 0, 2, 2)


def test_gpus_are_ignored_when_jax_is_told_to_use_cpus():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == ("0", "1")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}) == ()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()


# ------------------------------------------------------------------------------ decisions


def generation(*codes, step=None, count=None, **more):
    exits = tuple(Exit(i, code, "wait", step) for i, code in codes)
    return Generation(count or len(codes), exits, step=step, **more)


KILL, ABORT = -signal.SIGKILL, -signal.SIGABRT


def test_results_and_root_causes():
    assert generation((0, 0), (1, 0)).result == "done"
    assert generation((0, 42), (1, 42)).result == "preempted"
    assert generation((1, 42), (0, ABORT)).result == "preempted"
    assert generation((1, 42), (0, 1)).result == "failed"
    assert generation((0, -15), (1, -15), stop_signal=15).result == "stopped"
    assert generation((0, 0), count=2).result == "failed"
    failed = generation((0, 17), (2, ABORT), (1, KILL))
    assert (failed.root.process_index, failed.culprit) == (1, 1)
    assert str(failed.root) == "process 1 failed, phase 'wait' (killed by SIGKILL)"
    assert generation((2, ABORT), (0, 17)).root.process_index == 2
    assert generation((0, 17), hang="...", hang_process=1).culprit == 1


def test_a_finished_preempted_or_stopped_run_is_not_restarted():
    assert next_action([generation((0, 0))], max_restarts=3).code == 0
    assert next_action([generation((0, 42))], max_restarts=3).code == 42
    stopped = generation((0, -15), stop_signal=signal.SIGINT)
    assert next_action([stopped], max_restarts=3).code == 130


def test_restart_budget_is_refilled_by_progress():
    dead = generation((0, KILL), step=5)
    assert next_action([dead], max_restarts=1) == Restart(1, "restart 1 of 1 without progress")
    assert next_action([dead, dead], max_restarts=1) == Stop(137, "1 restarts without progress")
    further = generation((0, KILL), step=6)
    assert isinstance(next_action([dead, further], max_restarts=1), Restart)
    assert isinstance(next_action([dead, further, further], max_restarts=1), Stop)
    assert isinstance(next_action([dead], max_restarts=0), Stop)


def test_the_same_local_error_twice_stops_but_a_killed_process_does_not():
    error = generation((1, 1), (0, 17), step=12)
    assert next_action([error, error], max_restarts=9) == Stop(
        1, "the same error twice at step 12: starting again cannot help"
    )
    elsewhere = generation((1, 1), (0, 17), step=13)
    assert isinstance(next_action([error, elsewhere], max_restarts=9), Restart)
    killed = generation((1, KILL), (0, 17), step=12)
    assert isinstance(next_action([killed, killed], max_restarts=9), Restart)
    assert isinstance(next_action([error, killed], max_restarts=9), Restart)


def test_hangs_leave_with_75_when_the_budget_is_spent():
    hang = generation(count=2, hang="No progress", hang_process=1, step=3)
    assert next_action([hang, hang], max_restarts=1).code == 75


def test_shrinks_when_the_same_process_does_not_come_back():
    dead = generation((2, KILL), (0, 17), (1, 17), step=5)
    assert next_action([dead], max_restarts=3, shrink_to=(2, 1)).process_count == 3
    again = next_action([dead, dead], max_restarts=3, shrink_to=(1, 2))
    assert again == Restart(2, "process 2 does not come back; restart 2 of 3 without progress")
    other = generation((1, KILL), (0, 17), (2, 17), step=5)
    assert next_action([dead, other], max_restarts=3, shrink_to=(2,)).process_count == 3
    further = generation((2, KILL), (0, 17), (1, 17), step=6)
    assert next_action([dead, further], max_restarts=3, shrink_to=(2,)).process_count == 3


def test_a_reduced_count_that_does_not_fit_is_passed_over():
    dead = generation((3, KILL), count=4, step=5)
    misfit = generation((0, 1), (1, 1), (2, 1))
    action = next_action([dead, dead, misfit], max_restarts=5, shrink_to=(3, 2))
    assert action == Restart(2, "3 processes do not start")
    last = next_action([dead, dead, misfit], max_restarts=5, shrink_to=(3,))
    assert last.code == 1
