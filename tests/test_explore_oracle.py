"""The estimate beside the measured step: a line and a file, without slowing short runs."""

import json

import flax.nnx as nnx
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.explore.oracle import EstimateCheck, StepOracle, estimate_vs_measured


@pytest.fixture(scope="module")
def run():
    data = st.DataLoader({"x": np.ones((64, 4), "f"), "y": np.zeros((64,), "i")}, 16)
    loss = lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"])
    make = lambda rngs: nnx.Linear(4, 2, rngs=rngs)
    return st.plan(make, loss, optax.sgd(1.0), data.abstract_batch, "data=2,fsdp=4"), data


def test_estimate_vs_measured(run):
    plan, _ = run
    check = estimate_vs_measured(plan, 0.5)
    assert check.measured == 0.5
    assert check.estimated == plan.estimate().step_time
    assert sum(check.terms.values()) == pytest.approx(check.estimated)
    assert check.hardware in ("cpu:8", "local:1x8")
    assert json.loads(json.dumps(check.to_dict()))["ratio"] == pytest.approx(0.5 / check.estimated)


def test_words():
    base = {"hardware": "h100:1x8", "terms": {"compute": 0.1}, "strategy": "fsdp=8"}
    assert "per step on h100:1x8, measured 120 ms: 20% slower" in str(
        EstimateCheck(0.1, 0.12, **base)
    )
    assert "10% faster" in str(EstimateCheck(0.1, 0.09, **base))
    assert "3.0 times as long" in str(EstimateCheck(0.1, 0.3, **base))
    assert "doctor" in str(EstimateCheck(0.1, 0.3, **{**base, "hardware": "cpu:8"}))


def test_fit_says_it_once_and_keeps_it(run, tmp_path, capsys):
    plan, data = run
    plan.compile()  # so that it is worth it however short the run
    st.fit(plan, data, num_steps=9, directory=tmp_path)
    out = capsys.readouterr().out
    assert out.count("per step on ") == 1
    kept = json.loads((tmp_path / "estimate.json").read_text())
    assert kept["strategy"] == "data=2,fsdp=4"
    assert 0 < kept["measured"] < 10


def test_short_runs_say_nothing(run, tmp_path, capsys):
    plan, data = run
    st.fit(plan, data, num_steps=3, directory=tmp_path / "a", progress=False)
    fresh = plan.again()
    st.fit(fresh, data, num_steps=9, directory=tmp_path / "b", progress=False)  # compiling costs
    assert not (tmp_path / "a" / "estimate.json").exists()
    assert not fresh.is_compiled
    assert "estimate" not in capsys.readouterr().out


def test_time_of_a_rollback_is_no_step():
    oracle = StepOracle()
    oracle.on_step(1, {})
    oracle.on_rollback(0)
    oracle.on_end(None)
    assert oracle._times == []
