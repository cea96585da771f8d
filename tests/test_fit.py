"""The loop: resume, callbacks, evaluation, stopping, and what it refuses."""

import json
import os
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import DataError, RestoreMismatch
from shardtrain.monitoring import Preempted

ROWS = 16


class Network(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.up(x))))


def loss_fn(model, batch):
    logits = model(batch["x"])
    hits = np.float32(1) * (logits.argmax(-1) == batch["y"])
    return st.cross_entropy(logits, batch["y"]), {"accuracy": st.Mean(hits.sum(), hits.size)}


def scalar_loss(model, batch):
    logits = model(batch["x"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return nats.mean(), {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def columns(rows=100):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 8)).astype("float32")
    return {"x": x, "y": (x @ random.normal(size=(8, 4))).argmax(-1).astype("int32")}


@pytest.fixture(scope="module")
def loader():
    return st.DataLoader(columns(), ROWS, seed=3)


@pytest.fixture(scope="module")
def plan(loader, devices):
    return st.plan(Network, loss_fn, optax.adam(1e-2), loader.abstract_batch, "data=2,fsdp=4")


@pytest.fixture(scope="module")
def whole_run(plan, loader):
    """Twelve steps without interruption."""
    return st.fit(plan, loader, 12, progress=False)


def same(a, b):
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_loss_falls_and_every_step_is_in_the_history(whole_run):
    losses = [h["loss"] for h in whole_run.history]
    assert [h["step"] for h in whole_run.history] == list(range(1, 13))
    assert losses[-1] < 0.75 * losses[0]
    assert set(whole_run.history[0]) >= {"accuracy", "grad_norm", "weight", "skipped", "seconds"}


def test_two_resumes_are_bit_identical_to_one_run(plan, loader, whole_run, tmp_path):
    for steps in (4, 7, 12):
        result = st.fit(plan, loader, steps, tmp_path / "run", progress=False)
    assert [h["step"] for h in result.history] == [8, 9, 10, 11, 12]
    assert same(result.state, whole_run.state)
    assert result.history[-1]["loss"] == whole_run.history[-1]["loss"]
    assert plan.trace_counts["step"] == 1


def test_a_finished_run_is_left_alone(plan, loader, whole_run, tmp_path):
    st.fit(plan, loader, 3, tmp_path, progress=False)
    again = st.fit(plan, loader, 3, tmp_path, progress=False)
    assert again.history == []
    assert int(again.state.step) == 3


def test_resume_on_another_mesh_continues_the_same_batches(loader, plan, whole_run, tmp_path):
    st.fit(plan, loader, 6, tmp_path, progress=False)
    other = plan.again(strategy="data=4,tensor=2")
    result = st.fit(other, loader, 12, tmp_path, progress=False)
    got = [h["loss"] for h in result.history]
    expected = [h["loss"] for h in whole_run.history[6:]]
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_metrics_are_written_as_json_lines(plan, loader, tmp_path):
    st.fit(plan, loader, 3, tmp_path, eval_loader=loader, eval_every=2, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "grad_norm" in line]
    assert steps == [1, 2, 3]


class Recorder(st.Callback):
    def __init__(self):
        self.events = []

    def on_start(self, run):
        self.events.append(("start", run.first_step, run.num_steps))

    def on_step(self, step, metrics):
        assert all(isinstance(v, float) for v in metrics.values())
        self.events.append(("step", step))

    def on_eval(self, step, metrics):
        self.events.append(("eval", step))

    def on_end(self, result):
        self.events.append(("end", result.stopped))


def test_callbacks_see_host_numbers_in_order(plan, loader):
    recorder = Recorder()
    st.fit(plan, loader, 4, callbacks=[recorder], eval_loader=loader, eval_every=2, progress=False)
    assert recorder.events == [
        ("start", 0, 4), ("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4),
        ("eval", 4), ("end", None),
    ]  # fmt: skip


@pytest.mark.parametrize("loss", [loss_fn, scalar_loss], ids=["mean", "scalar"])
def test_evaluation_counts_every_example_once(loader, loss, devices):
    held_out = columns(37)
    plan = st.plan(Network, loss, optax.sgd(0.1), loader.abstract_batch, "data=8")
    state = plan.init(0)
    found = st.evaluate(plan, state, st.DataLoader(held_out, ROWS))
    model = plan.model(state)
    model.eval()
    logits = model(held_out["x"])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, held_out["y"])
    np.testing.assert_allclose(found["loss"], nats.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], (logits.argmax(-1) == held_out["y"]).mean())
    assert found["weight"] == 37


class SignalAt(st.Callback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step(self, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), self.number)


def test_ctrl_c_saves_and_returns_then_resumes(plan, loader, whole_run, tmp_path, capfd):
    stop = SignalAt(3, signal.SIGINT)
    first = st.fit(plan, loader, 12, tmp_path, callbacks=[stop], progress=False)
    assert first.stopped == "SIGINT"
    saved = int(first.state.step)
    assert 3 <= saved <= 5
    assert st.Checkpointer(tmp_path, plan).latest() == saved
    second = st.fit(plan, loader, 12, tmp_path, progress=False)
    assert second.history[0]["step"] == saved + 1
    assert same(second.state, whole_run.state)


def test_sigterm_saves_and_leaves_with_42(plan, loader, tmp_path):
    stop = SignalAt(2, signal.SIGTERM)
    with pytest.raises(Preempted) as left:
        st.fit(plan, loader, 12, tmp_path, callbacks=[stop], progress=False)
    assert left.value.code == 42
    assert st.Checkpointer(tmp_path, plan).latest() == left.value.step


def test_an_error_in_a_callback_reaches_the_user_and_keeps_checkpoints(plan, loader, tmp_path):
    class Bad(st.Callback):
        def on_step(self, step, metrics):
            if step == 5:
                raise RuntimeError("my own bug")

    with pytest.raises(RuntimeError, match="my own bug"):
        st.fit(plan, loader, 12, tmp_path, callbacks=[Bad()], save_every=2, progress=False)
    assert st.Checkpointer(tmp_path, plan).latest() == 4


def test_another_model_in_the_directory_is_refused_and_kept(plan, loader, tmp_path):
    st.fit(plan, loader, 2, tmp_path, progress=False)
    other = st.plan(
        lambda rngs: nnx.Linear(8, 4, rngs=rngs), loss_fn, optax.adam(1e-2),
        loader.abstract_batch, "data=8",
    )  # fmt: skip
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RestoreMismatch, match="up/kernel"):
        st.fit(other, loader, 5, tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_other_data_on_resume_is_refused(plan, loader, tmp_path):
    st.fit(plan, loader, 2, tmp_path, progress=False)
    with pytest.raises(DataError, match="seed: 3 → 4"):
        st.fit(plan, st.DataLoader(columns(), ROWS, seed=4), 5, tmp_path, progress=False)


def test_wrong_loaders_are_refused_before_anything_runs(plan):
    with pytest.raises(DataError, match=r"loader\.abstract_batch"):
        st.fit(plan, st.DataLoader(columns(), 32), 1, progress=False)
    with pytest.raises(DataError, match=r"st\.DataLoader"):
        st.fit(plan, [columns()], 1, progress=False)
