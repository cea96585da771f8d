"""Twenty faults of the campaign in `benchmarks/faults.py`, in real processes."""

import importlib.util
import pathlib
import random
import sys

import jax
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(280)]
FILE = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


RUNS = [  # those with an odd number take snapshots in memory too
    ["kill", "nan", "flip", "kill", "raise"],
    ["lost host", "kill", "nan", "kill in save", "delete"],
    ["kill", "truncate", "kill in save", "disk", "kill"],
    ["kill", "slow", "lost host", "raise", "kill"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all: clean runs are made once."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_runs_recover_bit_for_bit(faults, folder, number, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    names = RUNS[number]
    steps = faults.num_steps(len(names))
    record = faults.one_run(folder, number, names, random.Random(number), steps)
    assert record["wrong"] == []
    assert len(record["left_out"]) == names.count("nan")
    assert sum(record["struck"].values()) >= len(names)
