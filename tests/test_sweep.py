"""Sweeps: each trial trains as it would alone, the rest is bookkeeping."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import SweepError
from shardtrain.sweep import Trial, rungs
from shardtrain.sweep.result import survivors
from shardtrain.sweep.space import RandomSampler, grid

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 4, 4, 2)).astype("float32")
DATA = {"x": X, "y": np.argmax(X[:, 0, 0] @ RNG.normal(size=(2, 3)), axis=1)}


class Net(nnx.Module):
    """A convolution, dropout and BatchNorm: what mapped trials could get wrong."""

    def __init__(self, width=6, rate=0.1, *, rngs):
        self.conv = nnx.Conv(2, width, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))


def make(learning_rate=0.1, decay=0.0, width=6, rate=0.1):
    model = lambda rngs: Net(width, rate, rngs=rngs)
    loss = lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"])
    # Not Adam: it would enlarge the rounding of gradients that BatchNorm makes zero.
    return model, loss, optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate))


def loader():
    return st.DataLoader(DATA, global_batch_size=16)  # 90 examples: the last batch is not full


def sweep(space, num_steps=4, num_trials=None, fn=make, **options):
    return st.sweep(fn, space, loader(), num_steps, num_trials, progress=False, **options)


def alone(hyperparameters, num_steps, eval_loader=None):
    given = {k: v for k, v in hyperparameters.items() if k != "seed"}
    data = loader()
    plan = st.plan(*make(**given), data.abstract_batch, "data=1", devices=jax.devices()[:1])
    state, losses = plan.init(hyperparameters.get("seed", 0)), []
    for step in range(num_steps):
        state, metrics = plan.step(state, data.batch(step))
        losses.append(float(metrics["loss"]))
    return losses, state, None if eval_loader is None else st.evaluate(plan, state, eval_loader)


# -- the numbers ------------------------------------------------------------------------------


def test_stacked_trials_train_as_each_would_alone(devices):
    space = {"learning_rate": [0.003, 0.1], "decay": [0.0, 0.3], "seed": [0, 7]}
    found = sweep(space, eval_loader=loader())
    assert found.programs == 1
    for trial in (found.trials[0], found.trials[3], found.trials[-1]):
        losses, state, values = alone(trial.hyperparameters, 4, loader())
        np.testing.assert_allclose(trial.losses, losses, rtol=2e-4, atol=2e-5)
        assert trial.value == pytest.approx(values["loss"], rel=2e-4)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
        jax.tree.map(close, jax.device_get(trial.state.params), jax.device_get(state.params))
    firsts = {t.losses[0] for t in found.trials}
    assert len(firsts) == 2  # two seeds; rate and decay have not yet acted


def test_trials_over_devices_and_rows(devices):
    """Three trials on eight devices: all devices split the rows, and the numbers are the same."""
    found = sweep({"learning_rate": [0.01, 0.05, 0.1]})
    losses, _, _ = alone({"learning_rate": 0.1}, 4)
    np.testing.assert_allclose(found.trials[2].losses, losses, rtol=2e-4, atol=2e-5)


def test_trials_on_sub_meshes_train_as_each_would_alone(devices):
    space = {"learning_rate": [0.003, 0.1], "width": [6, 8]}
    found = sweep(space, 3, strategy="data=2,fsdp=2", eval_loader=loader())
    for trial in (found.trials[0], found.trials[3]):
        losses, _, values = alone(trial.hyperparameters, 3, loader())
        np.testing.assert_allclose(trial.losses, losses, rtol=2e-4, atol=2e-5)
        assert trial.value == pytest.approx(values["loss"], rel=2e-4)
    used = [{d.id for d in jax.tree.leaves(t.state.params)[0].devices()} for t in found.trials]
    assert used == [{0, 1, 2, 3}, {4, 5, 6, 7}] * 2


def test_widths_get_programs_of_their_own(devices):
    space = {"learning_rate": [0.01, 0.1], "width": [4, 6], "rate": [0.5]}
    found = sweep(space, 2, static=["rate"])
    assert found.programs == 2
    assert {t.status for t in found.trials} == {"done"}


# -- halving ----------------------------------------------------------------------------------


def test_halving_leaves_the_best_and_spends_less(devices):
    rates = [1e-6, 1e-5, 0.03, 1e-4]
    found = sweep({"learning_rate": rates}, 16, halving=2, min_steps=4)
    assert found.best.hyperparameters == {"learning_rate": 0.03}
    assert sorted(t.steps for t in found.trials) == [4, 4, 8, 16]
    assert [t.status for t in found.ranked] == ["done", "stopped", "stopped", "stopped"]
    assert "others were better at step 4" in str(found)
    losses, _, _ = alone({"learning_rate": 0.03}, 16)  # the same through every cut
    np.testing.assert_allclose(found.best.losses, losses, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((80, 8, 2, None), [10, 20, 40, 80]),
        ((81, 9, 3, None), [9, 27, 81]),
        ((80, 8, 2, 20), [20, 40, 80]),
        ((80, 8, None, None), [80]),
        ((80, 1, 2, None), [80]),
        ((3, 64, 2, None), [1, 3]),
    ],
)
def test_rungs(arguments, wanted):
    assert rungs(*arguments) == wanted


def test_survivors_are_the_best_and_never_none():
    trials = [Trial(i, {}, value=v) for i, v in enumerate([3.0, 1.0, 2.0, 5.0, 4.0])]
    trials[1].fail("broken")
    assert [t.number for t in survivors(trials, 2)] == [2, 0]
    assert [t.number for t in survivors(trials[:1], 4)] == [0]


# -- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strategy": "data=2"}], ids=["stacked", "sub-meshes"])
def test_a_trial_that_diverges_does_not_stop_the_others(devices, options):
    found = sweep({"learning_rate": [0.01, float("nan"), 0.1]}, 4, **options)
    assert [t.status for t in found.trials] == ["done", "failed", "done"]
    assert "steps were not finite" in found.trials[1].reason
    losses, _, _ = alone({"learning_rate": 0.1}, 4)
    np.testing.assert_allclose(found.trials[2].losses, losses, rtol=2e-4, atol=2e-5)
    assert "nan" in str(found)


@pytest.mark.parametrize("options", [{}, {"strategy": "data=2"}], ids=["stacked", "sub-meshes"])
def test_a_trial_that_raises_does_not_stop_the_others(devices, options):
    def broken(width, learning_rate):
        if width == 0:
            raise ValueError("a width of 0")
        return make(learning_rate, width=width)

    found = sweep({"width": [4, 0], "learning_rate": [0.1]}, 2, fn=broken, **options)
    assert [t.status for t in found.trials] == ["done", "failed"]
    assert found.trials[1].reason == "ValueError: a width of 0"
    with pytest.raises(SweepError, match="all 1 trials failed; trial 0: ValueError: a width of 0"):
        _ = sweep({"width": [0], "learning_rate": [0.1]}, 2, fn=broken, **options).best


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({}, {}, "the space is empty"),
        ({"rate": 0.1}, {}, "neither st.Uniform"),
        ({"rate": "abc"}, {}, "neither st.Uniform"),
        ({"learning_rate": st.Uniform(0.1, 0.2)}, {}, "say how many to draw"),
        ({"rate": [0.0, 0.5]}, {}, r"model of trial 1 \(\{'rate': 0.5\}\).*static="),
        ({"learning_rate": [0.1]}, {"strategy": "data=16"}, "needs 16 devices, there are 8"),
        ({"learning_rate": [0.1]}, {"strategy": "data=-1"}, "say how many each trial has"),
        ({"learning_rate": [0.1]}, {"strategy": "data=2", "stacked": True}, "needs 2"),
        ({"learning_rate": [0.1]}, {"halving": 1}, "halving must be at least 2"),
        ({"learning_rate": [0.1]}, {"rounds": 2}, "a grid has one round"),
        ({"learning_rate": [0.1]}, {"sampler": "grid", "num_trials": 2}, "sampler 'grid'"),
    ],
)
def test_what_cannot_be_swept_is_said(devices, space, options, message):
    with pytest.raises(SweepError, match=message):
        sweep(space, 2, **options)


def test_a_float_that_python_needs_is_named(devices):
    def needs_number(learning_rate):
        model, loss, _ = make()
        return model, loss, optax.sgd(0.1 if learning_rate > 0.05 else 0.01)

    with pytest.raises(SweepError, match=r"\(learning_rate\) is used where Python needs a number"):
        sweep({"learning_rate": [0.01, 0.1]}, 2, fn=needs_number)
    found = sweep({"learning_rate": [0.01, 0.1]}, 2, fn=needs_number, static=["learning_rate"])
    assert found.programs == 2


# -- proposals --------------------------------------------------------------------------------


def test_draws_are_reproducible_and_in_range():
    space = {"a": st.Uniform(1e-4, 1.0, log=True), "b": st.Uniform(-1.0, 1.0), "c": ["x", "y"]}
    points = RandomSampler(space, 3).ask(200)
    assert points == RandomSampler(space, 3).ask(200)
    assert points != RandomSampler(space, 4).ask(200)
    assert all(1e-4 <= p["a"] <= 1 and -1 <= p["b"] <= 1 for p in points)
    assert 0.3 < np.mean([p["a"] < 1e-2 for p in points]) < 0.7  # half of the decades
    assert {p["c"] for p in points} == {"x", "y"}
    assert grid({"c": ["x", "y"], "d": [1, 2]})[2] == {"c": "y", "d": 1}


@pytest.mark.parametrize("low_high_log", [(1.0, 1.0, False), (0.0, 1.0, True)])
def test_empty_ranges_are_refused(low_high_log):
    with pytest.raises(SweepError):
        st.Uniform(*low_high_log)


def test_optuna_proposes_in_rounds_and_learns_of_failures(devices):
    space = {"learning_rate": st.Uniform(1e-5, 1.0, log=True)}
    found = sweep(space, 3, 6, sampler="optuna", rounds=2)
    seen = [t.hyperparameters["learning_rate"] for t in found.trials]
    assert len(set(seen)) == 6
    assert [t.number for t in found.trials] == list(range(6))
    assert all(t.status == "done" for t in found.trials)


def test_rounds_tell_the_sampler(devices):
    class Fixed:
        def __init__(self):
            self.told = []

        def ask(self, count):
            return [{"learning_rate": 0.1 if i else float("nan")} for i in range(count)]

        def tell(self, tried, values):
            self.told.append((len(tried), [v is None for v in values]))

    fixed = Fixed()
    sweep({"learning_rate": [0.1]}, 2, 5, sampler=fixed, rounds=2)
    assert fixed.told == [(3, [True, False, False]), (2, [True, False])]


def test_table_and_picture(devices):
    found = sweep({"learning_rate": [0.001, 0.1], "width": [4, 6]}, 4, halving=2)
    text = str(found)
    assert text.splitlines()[0].startswith("4 trials in 2 programs, best first")
    assert "<table" in found._repr_html_()
    panels = found.plot().axes
    assert [a.get_xlabel() for a in panels] == ["step", "learning_rate", "width"]
    assert panels[1].get_xscale() == "log"
    assert len(panels[0].lines) == 4
