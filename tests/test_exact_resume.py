"""kill -9 and go on: bit for bit on the same layout, the same batches on any."""

import collections
import json
import os
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import shardtrain
from shardtrain.checkpoint import inspect
from shardtrain.launch import launch

pytestmark = [pytest.mark.processes, pytest.mark.timeout(280)]
WORKER = Path(__file__).parent / "resume_worker.py"
EXAMPLES, BATCH = 40, 8


def run(directory, num_steps, kill_at=0, processes=1, restarts=0, extra=(), shrink_to=()):
    directory.mkdir(exist_ok=True)
    environ = os.environ | {
        "PYTHONPATH": str(Path(shardtrain.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return launch(
        [sys.executable, str(WORKER), str(directory), str(num_steps), str(kill_at), *extra],
        num_processes=processes,
        devices_per_process=4 // processes,
        max_restarts=restarts,
        shrink_to=shrink_to,
        run_directory=directory / f"launch-{num_steps}-{kill_at}",
        output="none",
        environ=environ,
    )


def seen(directory):
    """step -> losses, and step -> examples that any process read for it."""
    losses, examples = collections.defaultdict(set), collections.defaultdict(set)
    for line in (directory / "seen.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            losses[record["step"]].add(record["loss"])
        else:
            examples[record["step"]].update(record["examples"])
    return losses, examples


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    assert run(directory, 100) == 0
    return directory


def test_killed_twice_is_bitwise_the_run_that_was_not(whole, tmp_path):
    for kill_at in (33, 66):
        assert run(tmp_path, 100, kill_at) == 128 + signal.SIGKILL
    assert run(tmp_path, 100) == 0
    assert (tmp_path / "final.json").read_text() == (whole / "final.json").read_text()
    losses, examples = seen(tmp_path)
    assert losses == seen(whole)[0]
    assert examples == seen(whole)[1]
    resumed = [json.loads(x)["step"] for x in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert resumed.count(29) == 4  # batch and loss of the first try, then again after step 28


def test_another_number_of_processes_goes_on_with_the_same_batches(whole, tmp_path):
    assert run(tmp_path, 100, kill_at=10, processes=2) == 128 + signal.SIGKILL
    assert run(tmp_path, 20) == 0
    losses, examples = seen(tmp_path)
    want_losses, want_examples = seen(whole)
    steps = range(1, 21)
    assert [examples[s] for s in steps] == [want_examples[s] for s in steps]
    per_epoch = EXAMPLES // BATCH
    for first in range(1, 21, per_epoch):
        epoch = [i for s in range(first, first + per_epoch) for i in examples[s]]
        assert sorted(epoch) == list(range(EXAMPLES))
    number = lambda values: float.fromhex(min(values))
    np.testing.assert_allclose(
        [number(losses[s]) for s in steps], [number(want_losses[s]) for s in steps], rtol=2e-5
    )


def test_when_a_process_does_not_come_back_fewer_go_on_with_the_same_batches(whole, tmp_path):
    options = {"processes": 2, "restarts": 3, "shrink_to": (1,), "extra": ["gone"]}
    assert run(tmp_path, 20, kill_at=10, **options) == 0
    [launched] = tmp_path.glob("launch-*")
    events = [json.loads(x) for x in (launched / "events.jsonl").read_text().splitlines()]
    assert [e["process_count"] for e in events if e["event"] == "start"] == [2, 2, 1]
    lines = [json.loads(x) for x in (tmp_path / "seen.jsonl").read_text().splitlines()]
    begun = [r["step"] for r in lines if r.get("process") == 0]
    # Three tries; whether the save of step 7 was committed when the process died is a race.
    assert (begun.count(10), begun.count(20)) == (3, 1)
    losses, examples = seen(tmp_path)
    want_losses, want_examples = seen(whole)
    steps = range(1, 21)
    assert [examples[s] for s in steps] == [want_examples[s] for s in steps]
    for step in steps:
        np.testing.assert_allclose(
            [float.fromhex(x) for x in losses[step]], float.fromhex(*want_losses[step]), rtol=2e-5
        )


def test_the_slow_process_is_named_with_what_it_is_slow_at(tmp_path):
    assert run(tmp_path, 100, processes=2, extra=["slow"]) == 0
    log = (tmp_path / "launch-100-0" / "generation-0" / "log-p0.txt").read_text()
    assert re.search(r"process 1 is \d+\.\dx slower, in data loading, for \d+ steps \(0\.0", log)
    assert "process 0 is" not in log


def test_a_lost_host_is_made_good_from_its_neighbour_without_any_disk(tmp_path):
    assert run(tmp_path, 12, kill_at=8, processes=2, restarts=1, extra=["lost"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "seen.jsonl").read_text().splitlines()]
    begun = [r["step"] for r in lines if r.get("process") == 1]
    assert begun.count(1) == 1  # it did not start anew
    assert max(begun) == 12
    losses = seen(tmp_path)[0]
    assert all(len(losses[step]) == 1 for step in range(1, 13))  # done again: the same bits
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.isdigit()] == ["12"]


def test_sigterm_to_one_process_saves_one_step_on_all_and_leaves_with_42(tmp_path):
    assert run(tmp_path, 1_000_000, kill_at=10, processes=2, extra=["term"]) == 42
    records = [json.loads(x) for x in (tmp_path / "seen.jsonl").read_text().splitlines()]
    last = [max(r["step"] for r in records if r.get("process") == p) for p in (0, 1)]
    newest = max(int(p.name) for p in (tmp_path / "run").iterdir() if p.name.isdigit())
    assert last == [newest, newest]
    [launched] = tmp_path.glob("launch-*")
    end = json.loads((launched / "events.jsonl").read_text().splitlines()[-1])
    assert [e["code"] for e in end["exits"]] == [42, 42]
    assert inspect(tmp_path / "run").problems == []
