"""The supervisor with workers that import no JAX: real processes, real signals, nothing left."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from shardtrain.errors import DistributedError, ShardtrainError
from shardtrain.launch.supervisor import launch

FAKE = str(pathlib.Path(__file__).with_name("launch_fake_worker.py"))
pytestmark = [pytest.mark.processes, pytest.mark.timeout(90)]


def alive(scratch):
    """Pids in the scratch folder whose process still runs (zombies do not)."""
    found = []
    for path in scratch.glob("pid-*"):
        pid = int(path.name.split("-")[1])
        done = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        if done.stdout.strip() and not done.stdout.strip().startswith("Z"):
            found.append(pid)
    return found


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def start(tmp_path, *behaviours, processes=2, **options):
    """Run the fake workers under a supervisor in this process; nothing may be left."""
    run = tmp_path / "run"
    code = launch(
        [sys.executable, FAKE, str(tmp_path), *behaviours],
        processes,
        run_directory=run,
        grace_seconds=0.5,
        **options,
    )
    assert len(list(tmp_path.glob("pid-*"))) >= processes
    assert alive(tmp_path) == []
    return code, [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_success_streams_with_prefixes_and_keeps_logs(tmp_path, capfd):
    code, events = start(tmp_path)
    assert code == 0
    out = capfd.readouterr().out
    assert "[p0] generation 0 process 0 of 2\n" in out
    assert "[p1] generation 0 process 1 of 2\n" in out
    logs = [tmp_path / "run" / "generation-0" / f"log-p{i}.txt" for i in (0, 1)]
    assert [log.read_text() for log in logs] == [f"generation 0 process {i} of 2\n" for i in (0, 1)]
    assert [e["event"] for e in events] == ["start", "end"]


def test_output_of_process_0_can_be_shown_alone_and_plain(tmp_path, capfd):
    assert start(tmp_path, output="first")[0] == 0
    assert capfd.readouterr().out == "generation 0 process 0 of 2\n"


def test_a_temporary_run_directory_goes_after_success(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert launch([sys.executable, FAKE, str(tmp_path)], 1, output="none") == 0
    assert list(tmp_path.glob("shardtrain-*")) == []


@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_process_restarts_all(tmp_path, capfd, process):
    code, events = start(tmp_path, f"kill@{process}", "none")
    assert code == 0
    assert [e.get("result") for e in events] == [None, "failed", None, "done"]
    first = events[1]["exits"][0]
    assert (first["process_index"], first["code"], first["step"]) == (process, -9, 2)
    err = capfd.readouterr().err
    assert f"process {process} failed at step 2, phase 'data' (killed by SIGKILL)" in err
    assert "restarting 2 processes from the last saved step (restart 1 of 3" in err


def test_a_death_is_noticed_in_under_a_fifth_of_a_second(tmp_path):
    """The best of three: what a busy machine adds is not the supervisor's."""
    code, events = start(tmp_path, "kill@0", "kill@1", "kill@0", "none")
    assert code == 0
    seen = [event["exits"][0]["time"] for event in events if event["event"] == "end"][:3]
    killed = [float((tmp_path / f"killed-{number}").read_text()) for number in range(3)]
    delays = [after - before for before, after in zip(killed, seen, strict=True)]
    assert all(delay > 0 for delay in delays)
    assert min(delays) < 0.2


def test_a_repeating_error_stops_and_its_traceback_is_shown_once(tmp_path, capfd):
    code, events = start(tmp_path, "raise@1")
    assert code == 1
    assert len(events) == 4
    err = capfd.readouterr().err
    assert err.count("Traceback (most recent call last)") == 1
    assert 'raise ValueError("boom at step 2")' in err
    assert "process 1 failed at step 2, phase 'data' (exit code 1)" in err
    assert "the same error twice at step 2: starting again cannot help; leaving with code 1" in err


def test_the_exit_code_of_the_first_failure_is_passed_on(tmp_path):
    assert start(tmp_path, "exit3@0", max_restarts=0)[0] == 3


def test_restarts_without_progress_are_counted_and_then_it_leaves(tmp_path, capfd):
    code, events = start(tmp_path, "kill@0", max_restarts=1)
    assert code == 128 + signal.SIGKILL
    assert [e["event"] for e in events] == ["start", "end"] * 2
    assert "1 restarts without progress; leaving with code 137" in capfd.readouterr().err


def test_a_hang_is_named_with_stacks_and_restarted(tmp_path, capfd):
    limits = {"data": 0.5, "wait": 0.5}
    code, _ = start(tmp_path, "sleep@1", "none", hang_timeouts=limits)
    assert code == 0
    err = capfd.readouterr().err
    assert "Process 0 is in phase 'wait' (waiting for the device)." in err
    assert "last reported step 2, phase 'data' (data loading)." in err
    assert "did not answer" not in err
    for process in (0, 1):
        stacks = tmp_path / "run" / "generation-0" / f"stacks-p{process}.txt"
        assert "launch_fake_worker.py" in stacks.read_text()


def test_a_stopped_process_is_recognised(tmp_path, capfd):
    code, _ = start(tmp_path, "stop@1", "none", hang_timeouts={"data": 0.5, "wait": 0.5})
    assert code == 0
    err = capfd.readouterr().err
    assert "is stopped by a signal or debugger" in err
    assert "(process 1 did not answer)" in err


def test_the_process_that_the_others_lost_is_named(tmp_path, capfd):
    assert start(tmp_path, "lost@1", "none")[0] == 0
    err = capfd.readouterr().err
    assert "The other processes lost contact and left. Process 1 (pid " in err
    assert "last reported step 1, phase 'data' (data loading), and is stopped by" in err


def test_a_hang_that_stays_leaves_with_75(tmp_path):
    limits = {"data": 0.3, "wait": 0.3}
    code, _ = start(tmp_path, "sleep@0", hang_timeouts=limits, max_restarts=0)
    assert code == 75


def test_children_of_workers_do_not_survive_a_success(tmp_path):
    assert start(tmp_path, "child@1")[0] == 0
    assert len(list(tmp_path.glob("pid-*"))) == 3


def test_runs_on_fewer_processes_when_one_does_not_come_back(tmp_path, capfd):
    code, events = start(tmp_path, "kill@1", processes=2, shrink_to=(1,))
    assert code == 0
    assert [e["process_count"] for e in events if e["event"] == "start"] == [2, 2, 1]
    assert "restarting 1 process instead of 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 0}, "must be at least 1"),
        ({"devices_per_process": 0}, "must be at least 1"),
        ({"shrink_to": (2,)}, "must be between 1 and 1"),
        ({"max_restarts": -1}, "must be 0 or more"),
        ({"output": "al"}, "did you mean 'all'"),
        ({"hang_timeouts": {"wat": 1.0}}, "did you mean 'wait'"),
        ({"command": ["no-such-program"]}, "not found on PATH"),
    ],
)
def test_wrong_arguments_start_nothing(tmp_path, options, message):
    options = {"command": [sys.executable, FAKE, str(tmp_path)], "num_processes": 2, **options}
    with pytest.raises(ShardtrainError, match=message):
        launch(options.pop("command"), options.pop("num_processes"), **options)
    assert list(tmp_path.iterdir()) == []
    assert issubclass(DistributedError, ShardtrainError)


def supervisor(tmp_path, behaviour, **options):
    """A supervisor in a process of its own, once its two workers are ready."""
    code = (
        "import sys; from shardtrain.launch.supervisor import launch\n"
        f"sys.exit(launch([sys.executable, {FAKE!r}, {str(tmp_path)!r}, {behaviour!r}], 2, "
        f"run_directory={str(tmp_path / 'run')!r}, **{options!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    until(lambda: all((tmp_path / f"ready-{i}").exists() for i in (0, 1)))
    return process


def test_sigterm_is_forwarded_and_workers_that_saved_end_the_run_with_42(tmp_path):
    process = supervisor(tmp_path, "preemptible@0")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 42
    assert "preempted; leaving with code 42" in err
    assert alive(tmp_path) == []


def test_a_process_ended_by_sigterm_does_not_cut_short_one_that_saves(tmp_path):
    process = supervisor(tmp_path, "half-preemptible@0")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (tmp_path / "saved-0").exists()
    assert alive(tmp_path) == []


def test_ctrl_c_twice_ends_stubborn_workers_and_their_children(tmp_path):
    process = supervisor(tmp_path, "stubborn@0")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(list(tmp_path.glob("pid-*"))) == 4
    assert alive(tmp_path) == []


def test_workers_that_do_not_leave_are_ended_after_the_grace_time(tmp_path):
    process = supervisor(tmp_path, "stubborn@0", stop_grace_seconds=0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert alive(tmp_path) == []


def test_nothing_survives_a_killed_supervisor(tmp_path):
    process = supervisor(tmp_path, "stubborn@0")
    stopped = int(next(tmp_path.glob("pid-*")).name.split("-")[1])
    os.kill(stopped, signal.SIGSTOP)
    assert len(alive(tmp_path)) == 4
    process.kill()
    process.communicate(timeout=60)
    until(lambda: alive(tmp_path) == [])
