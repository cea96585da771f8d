"""Before the first step: processes that are not alike are told so, by name, on both sides."""

import json
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import shardtrain as st
from shardtrain.errors import DataError
from shardtrain.launch import launch
from shardtrain.recovery.preflight import first_batch_facts

WORKER = Path(__file__).with_name("preflight_worker.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What process 0 and process 1 were told in each case."""
    directory = tmp_path_factory.mktemp("preflight")
    environ = os.environ | {
        "PYTHONPATH": str(WORKER.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    code = launch(
        [sys.executable, str(WORKER), str(directory)],
        num_processes=2,
        devices_per_process=2,
        max_restarts=0,
        run_directory=directory / "launch",
        environ=environ,
    )
    assert code == 0
    return [json.loads((directory / f"report-{i}.json").read_text()) for i in (0, 1)]


@pytest.mark.processes
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("case", "named", "not_named"),
    [
        ("other files", "first batch x: ", "first batch y"),
        ("other vocabulary", "first batch y: ", "first batch x"),
        ("other order", "first batch x: ", "data fingerprint"),
        ("other noise", "first batch x: ", "first batch y"),
        ("other dtype", "data fingerprint: ", "strategy"),
        ("other learning rate", "program: ", "data"),
        ("other width", "program: ", "data"),
        ("other version", "optax: ", "program"),
        ("other eval data", "eval data: ", "program"),
        ("other settings", "save_every: ", "program"),
    ],
)
def test_the_odd_process_out_is_named_on_both(reports, case, named, not_named):
    for report in reports:
        text = report[case]
        assert "the 2 processes do not run the same thing" in text
        [line] = [x.strip() for x in text.splitlines() if x.strip().startswith(named)]
        assert re.search("process 0 has '.*'", line)
        assert re.search("process 1 has '.*'", line)
        assert f"\n  {not_named}" not in text


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_processes_that_are_alike_train(reports):
    assert [report["same"] for report in reports] == ["done 2", "done 2"]


def columns():
    return {"x": np.arange(320.0, dtype="f").reshape(80, 4), "y": np.arange(80, dtype="i")}


def test_the_first_batch_is_the_batch_of_that_step():
    facts = first_batch_facts(st.DataLoader(columns(), 40), 0)
    assert list(facts) == ["first batch", "first batch x", "first batch y"]
    assert facts["first batch"].startswith("step 1, rows 0, 5, 11, 16, 22, 27, 33, 39 of ")
    assert facts["first batch x"].startswith("float32[40,4] ")
    again = first_batch_facts(st.DataLoader(columns(), 40), 0)
    later = first_batch_facts(st.DataLoader(columns(), 40), 1)
    assert facts == again
    assert all(facts[name] != later[name] for name in facts)


def test_only_the_rows_that_are_looked_at_count():
    """What the documentation says is not compared: every other row."""
    loader = lambda x: st.DataLoader({**columns(), "x": x}, 40, shuffle=False)
    for row, is_seen in ((5, True), (6, False)):
        x = columns()["x"]
        x[row, 2] += 1
        same = first_batch_facts(loader(x), 0) == first_batch_facts(loader(columns()["x"]), 0)
        assert same != is_seen


def test_a_batch_of_one_row_and_a_row_that_cannot_be_read():
    loader = st.DataLoader([1.0, 2.0], 1, shuffle=False)
    facts = first_batch_facts(loader, 0)
    assert facts["first batch"] == "step 1, rows 0 of PyTreeDef(*)"
    assert facts["first batch (itself)"].startswith("float32[1] ")

    def broken(example):
        if example["y"] == 11:
            raise ValueError("no such file")
        return example

    loader = st.DataLoader(columns(), 40, shuffle=False, transform=broken)
    with pytest.raises(DataError, match=r"transform failed on example 11 .*no such file"):
        first_batch_facts(loader, 0)


def test_rows_are_those_of_the_batch():
    loader = st.DataLoader(columns(), 40, seed=3)
    rows = np.asarray([2, 17, 39])
    found, whole = loader.rows(1, rows), loader.batch(1)
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name][rows])
    loader.close()
