"""A few faults of the campaign in `benchmarks/faults.py`, in real processes."""

import importlib.util
import pathlib
import sys

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


def test_runs_recover_bit_for_bit(faults, tmp_path):
    report = faults.campaign(4, 4, 0, tmp_path, kinds=["kill", "kill in save", "flip", "raise"])
    assert [run["wrong"] for run in report["runs"]] == [[]]
    assert report["struck"] == {"kill": 2, "flip": 1, "raise": 1}
