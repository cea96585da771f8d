"""The fault campaign itself: what it draws, and that it notices a wrong run."""

import importlib.util
import pathlib
import random
import sys

import pytest

FILE = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


def test_every_kind_of_fault_can_be_drawn_and_steps_increase(faults):
    draw = random.Random(0)
    for kind in faults.KINDS:
        generations = [faults.draw_generation(draw, number, kind) for number in range(5)]
        steps = [g[0]["step"] for g in generations if g[0]["step"] is not None]
        assert steps == sorted(set(steps))
        assert all(step < faults.num_steps(5) for step in steps)


def test_a_wrong_run_is_noticed(faults, tmp_path):
    for name, loss, final in (("clean", "0x1p+0", "a"), ("run", "0x1p+1", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "timeline.jsonl").write_text(
            f'{{"kind": "step", "step": 3, "loss": "{loss}"}}\n'
        )
        (tmp_path / name / "final.json").write_text(final)
    wrong = faults.compare(tmp_path / "run", tmp_path / "clean", 75)
    assert wrong == ["exit code 75", "losses differ at steps [3]", "final state differs"]
    assert faults.compare(tmp_path / "clean", tmp_path / "clean", 0) == []


def test_steps_that_were_left_out_are_not_compared(faults, tmp_path):
    for name, loss in (("clean", "0x1p+0"), ("run", "nan")):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "timeline.jsonl").write_text(
            f'{{"kind": "step", "step": 3, "loss": "{loss}"}}\n'
        )
        (tmp_path / name / "final.json").write_text("same")
    (tmp_path / "run" / "run" / "bad_steps.jsonl").write_text('{"step": 3}\n')
    assert faults.left_out(tmp_path / "run") == (3,)
    assert faults.compare(tmp_path / "run", tmp_path / "clean", 0) == []
