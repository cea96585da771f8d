"""Progress files, hang detection, stragglers, agreement: pure or in one process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from shardtrain.errors import DistributedError, ShardtrainError
from shardtrain.monitoring import (
    DEFAULT_HANG_TIMEOUTS,
    PHASES,
    Hang,
    ProcessStatus,
    Progress,
    Watchdog,
    check_agreement,
    describe_hang,
    disagreements,
    enable_stack_dumps,
    exchange_facts,
    find_hang,
    find_stragglers,
    fingerprint,
    gather_step_times,
    hang_timeouts,
    read_progress,
)
from shardtrain.monitoring.progress import progress_path

LIMITS = hang_timeouts({"data": 5.0, "dispatch": 5.0, "wait": 5.0, "first_step": 60.0})


def status(index, phase, step, age, **more):
    return ProcessStatus(index, phase, step, age, pid=100 + index, host="gpu-07", **more)


# ------------------------------------------------------------------------------ progress


def test_progress_is_readable_at_once_and_keeps_the_step(tmp_path):
    progress = Progress(tmp_path, process_index=3)
    progress.phase("data", step=7)
    progress.phase("dispatch")
    record = read_progress(tmp_path, 3)
    assert (record.process_index, record.phase, record.step, record.changes) == (
        3,
        "dispatch",
        7,
        2,
    )
    assert record.pid == os.getpid()
    assert record == progress.record
    progress.close()
    assert read_progress(tmp_path, 3) == record
    assert read_progress(tmp_path, 4) is None


def test_a_longer_record_is_fully_replaced_by_a_shorter_one(tmp_path):
    progress = Progress(tmp_path, 0)
    progress.phase("first_step", step=10**15)
    progress.phase("data", step=1)
    assert progress_path(tmp_path, 0).stat().st_size == 256
    assert read_progress(tmp_path, 0).step == 1
    progress.close()


def test_a_damaged_record_is_noticed(tmp_path):
    progress = Progress(tmp_path, 0)
    progress.phase("data", step=1)
    progress.close()
    path = progress_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    content[content.index(b'"data"') + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardtrainError, match="is damaged"):
        read_progress(tmp_path, 0)


def test_progress_survives_kill_9(tmp_path):
    script = """
        import os, signal, sys
        from shardtrain.monitoring.progress import Progress
        progress = Progress(sys.argv[1], 0)
        for step in range(1000):
            progress.phase("data", step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert (read_progress(tmp_path, 0).phase, read_progress(tmp_path, 0).step) == ("data", 999)


def test_unknown_phase_is_an_error_with_the_nearest_name():
    with pytest.raises(ShardtrainError, match="did you mean 'dispatch'"):
        Progress(None, 0).phase("dispach")


def test_times_are_added_per_phase_of_completed_steps(monkeypatch):
    clock = iter([0.0, 10.0, 10.5, 11.0, 11.25, 12.0, 13.0])
    monkeypatch.setattr("shardtrain.monitoring.progress.time.monotonic", lambda: next(clock))
    progress = Progress(None, 0)  # 0.0
    progress.phase("data", 1)  # 10.0: time before the first step belongs to no step
    progress.phase("dispatch", 1)  # 10.5
    progress.phase("data", 1)  # 11.0
    progress.phase("wait", 1)  # 11.25
    progress.phase("data", 2)  # 12.0
    progress.phase("wait", 2)  # 13.0
    assert progress.step_times() == {1: {"data": 0.75, "dispatch": 0.5, "wait": 0.75}}


def test_progress_comes_from_the_environment(tmp_path):
    there = {"SHARDTRAIN_RUN_DIRECTORY": str(tmp_path), "SHARDTRAIN_PROCESS_INDEX": "2"}
    progress = Progress.from_environment(there)
    assert progress.path == progress_path(tmp_path, 2)
    progress.close()
    assert Progress.from_environment({}).path is None


# ------------------------------------------------------------------------------ hangs


def test_the_process_that_does_not_wait_is_the_culprit():
    hang = find_hang(
        [status(0, "wait", 812, 6.0), status(1, "wait", 812, 6.0), status(2, "data", 811, 6.1)],
        LIMITS,
    )
    assert describe_hang(hang, "run/stacks") == (
        "No progress for 6 s at step 812. Processes 0 and 1 are in phase 'wait' (waiting for the "
        "device). Process 2 (pid 102 on gpu-07) last reported step 811, phase 'data' (data "
        "loading). Stacks of all threads: run/stacks."
    )


@pytest.mark.parametrize(
    ("statuses", "culprits"),
    [
        ([("wait", 5, 1.0), ("wait", 5, 1.0)], None),  # healthy
        ([("wait", 5, 9.0), ("first_step", 5, 9.0)], None),  # one still compiles
        ([("wait", 5, 9.0), ("ckpt", 5, 9.0)], None),  # one saves
        ([("dist_init", None, 400.0), ("import", None, 400.0)], None),  # slow import
        ([("wait", 5, 9.0), ("wait", 5, 9.0)], []),  # nobody is behind
        ([("wait", 5, 9.0), ("wait", 4, 9.0)], [1]),  # behind by one step
        ([("dispatch", 5, 9.0), ("data", 5, 5.5)], [1]),
        ([("dispatch", 5, 9.0), ("data", 5, 4.0)], None),  # data still within its limit
        ([("first_step", 0, 61.0), ("first_step", 0, 61.0)], [0, 1]),
        ([("wait", 5, 9.0), ("done", 6, 100.0)], [0]),  # a finished process excuses nobody
        ([("data", 1, 9.0)], [0]),
    ],
)
def test_find_hang(statuses, culprits):
    hang = find_hang([status(i, *s) for i, s in enumerate(statuses)], LIMITS)
    found = None if hang is None else [s.process_index for s in hang.culprits]
    assert found == culprits


def test_a_stopped_process_is_the_culprit_even_if_it_seems_to_wait():
    hang = find_hang([status(0, "wait", 5, 9.0), status(1, "wait", 5, 9.0, stopped=True)], LIMITS)
    assert [s.process_index for s in hang.culprits] == [1]
    assert "is stopped by a signal or debugger" in describe_hang(hang)


def test_nobody_behind_suspects_program_or_network():
    rows = (status(0, "wait", 5, 9.0), status(1, "wait", 5, 9.0))
    assert "a collective does not complete" in describe_hang(Hang(rows, ()))


def test_timeouts_are_checked_and_completed():
    assert set(DEFAULT_HANG_TIMEOUTS) == set(PHASES)
    assert hang_timeouts(7.0)["wait"] == 7.0
    assert hang_timeouts(7.0)["first_step"] == 3600.0
    assert hang_timeouts({"data": None})["data"] is None
    with pytest.raises(ShardtrainError, match="did you mean 'ckpt'"):
        hang_timeouts({"ckp": 3.0})
    with pytest.raises(ShardtrainError, match="must be > 0"):
        hang_timeouts(0.0)


def test_watchdog_reports_a_stuck_phase_and_not_a_moving_one():
    reports = []
    stuck = threading.Event()
    progress = Progress(None, 0)
    with Watchdog(
        progress,
        {"wait": 0.2},
        patience=1.0,
        interval=0.01,
        on_hang=lambda report: (reports.append(report), stuck.set()),
    ):
        for step in range(100):
            progress.phase("wait", step)
        progress.phase("first_step", 100)
        assert not stuck.wait(0.05)
        progress.phase("wait", 101)
        assert stuck.wait(20)
    assert len(reports) == 1
    assert "last reported step 101, phase 'wait'" in reports[0]


def test_watchdog_leaves_with_75_and_its_stacks_while_the_main_thread_is_blocked():
    script = """
        import time
        from shardtrain.monitoring import Progress, Watchdog
        progress = Progress(None, 0)
        progress.phase("data", 3)
        with Watchdog(progress, {"data": 0.2}, interval=0.05):
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75
    assert "last reported step 3, phase 'data'" in done.stderr
    assert 'File "<string>", line 7 in <module>' in done.stderr


def test_sigusr1_writes_stacks(tmp_path):
    script = """
        import os, signal, sys
        from shardtrain.monitoring import enable_stack_dumps
        assert enable_stack_dumps(sys.argv[1])
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    path = tmp_path / "deep" / "stacks.txt"
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], timeout=60, check=True
    )
    assert 'File "<string>", line 5 in <module>' in path.read_text()
    assert callable(enable_stack_dumps)


# ------------------------------------------------------------------------------ stragglers


def test_the_slow_loader_is_named_with_factor_and_duration():
    fast = {s: {"data": 0.1, "dispatch": 0.05, "wait": 0.75} for s in range(50)}
    slow = {s: {"data": 0.1, "dispatch": 0.05, "wait": 0.75} for s in range(10)}
    slow |= {s: {"data": 0.5, "dispatch": 0.05, "wait": 0.35} for s in range(10, 50)}
    found = find_stragglers({**dict.fromkeys(range(5), fast), 5: slow})
    assert [str(s) for s in found] == [
        "process 5 is 1.8x slower, in data loading, for 40 steps (0.5 s per step, the others 0.1 s)"
    ]


def test_no_straggler_when_all_are_alike_or_it_is_over_or_too_short():
    fast = {s: {"data": 0.1, "wait": 0.5} for s in range(20)}
    slow = {s: {"data": 0.5, "wait": 0.1} for s in range(20)}
    assert find_stragglers({0: fast}) == ()
    assert find_stragglers({0: slow, 1: slow}) == ()
    assert find_stragglers({0: fast, 1: {**slow, 19: fast[19]}}) == ()
    short = {**fast, **{s: slow[s] for s in (17, 18, 19)}}
    assert find_stragglers({0: fast, 1: short}) == ()
    assert len(find_stragglers({0: fast, 1: short}, min_steps=3)) == 1


def test_a_large_ratio_of_a_tiny_time_is_no_straggler():
    times = {p: {s: {"data": 1e-4, "wait": 0.5} for s in range(20)} for p in range(3)}
    times[1] = {s: {"data": 1e-2, "wait": 0.49} for s in range(20)}
    assert find_stragglers(times) == ()


def test_the_worst_straggler_comes_first_and_missing_steps_are_ignored():
    times = {p: {s: {"data": 0.1, "wait": 0.9} for s in range(20)} for p in range(4)}
    times[1] = {s: {"data": 0.3, "wait": 0.7} for s in range(21)}
    times[2] = {s: {"dispatch": 0.8, "data": 0.1, "wait": 0.1} for s in range(19)}
    found = find_stragglers(times)
    assert [(s.process_index, s.phase, s.num_steps) for s in found] == [
        (2, "dispatch", 19),
        (1, "data", 19),
    ]


def test_a_dispatch_that_waits_for_a_slow_loader_is_no_straggler():
    slow = {s: {"data": 0.052, "dispatch": 0.001} for s in range(20)}
    blocked = {s: {"data": 0.002, "dispatch": 0.051} for s in range(20)}
    [found] = find_stragglers({0: blocked, 1: slow})
    assert (found.process_index, found.phase) == (1, "data")
    own = {s: {"data": 0.002, "dispatch": 0.101} for s in range(20)}  # 0.05 s of it its own
    found = find_stragglers({0: own, 1: slow, 2: slow})
    assert ("dispatch", 0) in [(s.phase, s.process_index) for s in found]


def test_step_times_survive_the_exchange():
    own = {s: {"data": 0.25, "wait": 1e-6, "ckpt": 5000.0} for s in range(5)}
    sent = []

    def gather(table):
        sent.append(table)
        return np.stack([table, np.full_like(table, -1)])

    found = gather_step_times(own, num_steps=3, gather=gather)
    assert found == {
        0: {s: {"data": 0.25, "wait": 1e-6, "ckpt": 2147.483647} for s in (2, 3, 4)},
        1: {},
    }
    assert sent[0].dtype == np.int32
    assert gather_step_times({}, 2) == {0: {}}


# ------------------------------------------------------------------------------ agreement


def test_the_odd_process_out_is_named_first():
    same = {"program": "aa", "jax": "0.10.2"}
    table = [same, same, {**same, "program": "bb"}, same]
    assert disagreements(table) == ("program: process 2 has 'bb', processes 0, 1, 3 have 'aa'",)
    assert disagreements([same, same]) == ()
    assert disagreements([same, {"jax": "0.10.2"}]) == (
        "program: process 0 has 'aa', process 1 has '(missing)'",
    )


def test_check_agreement_raises_on_every_process():
    table = [{"batch": "1"}, {"batch": "2"}]
    for facts in table:
        with pytest.raises(DistributedError, match="batch: process 0 has '1', process 1 has '2'"):
            check_agreement(facts, exchange=lambda _: table)
    check_agreement(table[0], exchange=lambda facts: [facts, facts])
    assert exchange_facts(table[0]) == (table[0],)


def test_fingerprint_separates_its_parts():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(b"abc") == fingerprint("abc") == "ce91dc5eec0139ad"
