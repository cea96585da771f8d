"""A bad step re-executed: the first thing that is not finite is named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.cli import main
from shardtrain.cli.problem import load_problem
from shardtrain.errors import ShardtrainError
from shardtrain.recovery import replay_step

ROWS, STEPS = 8, 6


class Block(nnx.Module):
    """Takes a logarithm: of a negative number in one batch only."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.log = Log()

    def __call__(self, x, flag):
        return x + self.log(self.linear(x), flag)


class Log(nnx.Module):
    def __call__(self, x, flag):
        return jnp.log(1 + jnp.abs(x) - flag[:, None] * 100)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(3)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, flag):
        for number, layer in enumerate(self.layers):
            x = layer(x, flag * (number == 1))
        return self.head(x)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, flag):
        x = nn.Dense(4, name="up")(x)
        return nn.Dense(3, name="head")(LinenLog(name="log")(x, flag))


class LinenLog(nn.Module):
    def __call__(self, x, flag):
        return jnp.log(1 + jnp.abs(x) - flag[:, None] * 100)


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["x"], batch["flag"]), batch["y"])


def loader(flagged=(), bad=(), value=np.nan):
    """Batches in reading order; the model takes a bad logarithm where a step is flagged."""
    random = np.random.default_rng(0)
    x = random.normal(size=(STEPS * ROWS, 4)).astype("float32")
    y = random.integers(0, 3, STEPS * ROWS).astype("int32")
    flag = np.zeros(STEPS * ROWS, "float32")
    for step in flagged:
        flag[(step - 1) * ROWS + 5] = 1
    for step in bad:
        x[(step - 1) * ROWS + 6] = value
    return st.DataLoader({"x": x, "y": y, "flag": flag}, ROWS, shuffle=False)


def make_plan(model, strategy):
    return st.plan(model, loss_fn, optax.adam(1e-2), loader().abstract_batch, strategy)


def run(plan, data, directory, **options):
    return st.fit(plan, data, STEPS, directory, progress=False, **options)


@pytest.fixture(scope="module")
def plan(devices):
    return make_plan(Network, "data=2,fsdp=2,tensor=2")


def test_the_module_is_named_and_nothing_is_changed(plan, tmp_path):
    run(plan, loader(flagged={4}), tmp_path, save_every=2)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    report = replay_step(plan, loader(flagged={4}), tmp_path)
    assert (report.step, report.replayed_from) == (4, 2)
    assert (report.first.what, report.first.path) == ("module", "layers/1/log")
    assert report.first.where == "output is not finite, inputs are finite"
    assert np.isnan(report.loss)
    gradients = [f.path for f in report.findings if f.what == "gradient"]
    assert "layers/1/linear/kernel" in gradients
    assert "recorded: step 4: not finite" in str(report)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_linen_model_from_its_first_state(tmp_path, devices):
    plan = make_plan(LinenNetwork(), "data=4,fsdp=2")
    run(plan, loader(flagged={3}), tmp_path)
    report = replay_step(plan, loader(flagged={3}), tmp_path)
    assert (report.replayed_from, report.first.path) == (0, "log")


def test_rows_of_the_batch_and_their_devices(plan, tmp_path):
    run(plan, loader(bad={2}), tmp_path)
    report = replay_step(plan, loader(bad={2}), tmp_path)
    assert (report.first.what, report.first.path) == ("batch", "x")
    x = loader(bad={2}).batch(1, plan.layout.batch_shardings)["x"]
    holders = [str(s.device) for s in x.addressable_shards if np.isnan(s.data).any()]
    assert report.first.where == "row 6 on " + ", ".join(holders)


def broken_copy(array, device):
    """The array, with one device's copy of its shard not a number."""
    copies = [
        jax.device_put(np.asarray(s.data) * (np.nan if s.device.id == device else 1), s.device)
        for s in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)


def test_a_broken_copy_of_a_parameter_names_its_device(plan, tmp_path, monkeypatch):
    run(plan, loader(), tmp_path, save_every=3)
    state = st.Checkpointer(tmp_path, plan).restore(3)
    broken = broken_copy(state.params["head"]["bias"], device=3)
    params = state.params | {"head": state.params["head"] | {"bias": broken}}
    monkeypatch.setattr(
        "shardtrain.recovery.replay._state_before", lambda *a: state.replace(params=params)
    )
    report = replay_step(plan, loader(), tmp_path, step=4)
    assert (report.first.what, report.first.path) == ("parameter", "head/bias")
    assert report.first.where == "on cpu:3"


def test_a_fault_that_does_not_come_back_is_called_one(plan, tmp_path):
    run(plan, loader(flagged={4}), tmp_path, save_every=2)
    report = replay_step(plan, loader(), tmp_path, step=4)
    assert report.first is None
    assert "in a device or its memory" in str(report)


def test_a_replayed_step_has_the_very_loss_of_the_run(plan, tmp_path):
    done = run(plan, loader(), tmp_path, save_every=2)
    report = replay_step(plan, loader(), tmp_path, step=6)
    assert report.replayed_from == 4
    np.testing.assert_allclose(report.loss, done.history[5]["loss"], rtol=1e-6)
    np.testing.assert_allclose(report.grad_norm, done.history[5]["grad_norm"], rtol=1e-5)
    assert len(report.largest_gradients) == 3


def test_what_cannot_be_replayed(plan, tmp_path):
    with pytest.raises(ShardtrainError, match="no bad step is recorded"):
        replay_step(plan, loader(), tmp_path)
    with pytest.raises(ShardtrainError, match="counted from 1"):
        replay_step(plan, loader(), tmp_path, step=0)


# -- pipelines, and the command ------------------------------------------------------------------


class Same(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.up(x)


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Same(rngs) for _ in range(4)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack_loss(model, batch):
    return st.cross_entropy(model(batch["x"]), batch["y"])


def test_layers_of_a_pipeline_keep_their_names(tmp_path, devices, monkeypatch):
    plan = st.plan(
        Stack, stack_loss, optax.sgd(0.1), loader().abstract_batch,
        "data=2,pipeline=2,num_microbatches=2", devices=devices[:4],
    )  # fmt: skip
    state = plan.init(0)
    tree = plan.to_checkpoint(state).params
    layers = tree["layers"]
    up = layers[2]["up"] | {"kernel": layers[2]["up"]["kernel"] * np.nan}
    params = tree | {"layers": layers | {2: layers[2] | {"up": up}}}
    broken = plan.from_checkpoint(plan.to_checkpoint(state).replace(params=params))
    monkeypatch.setattr("shardtrain.recovery.replay._state_before", lambda *a: broken)
    report = replay_step(plan, loader(), tmp_path, step=1)
    assert [(f.what, f.path) for f in report.findings[:2]] == [
        ("parameter", "layers/2/up/kernel"), ("module", "layers/2/up"),
    ]  # fmt: skip


PROBLEM = """
import numpy as np, optax, shardtrain as st
from flax import nnx

def problem():
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    x[19] = np.inf
    loader = st.DataLoader({"x": x, "y": np.zeros(32, "int32")}, 8, shuffle=False)
    loss = lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"])
    return (lambda rngs: nnx.Linear(4, 3, rngs=rngs)), loss, optax.sgd(0.1), loader

def no_loader():
    return (*problem()[:3], {"x": np.zeros((8, 4), "float32")})
"""


def test_the_command_on_a_script(tmp_path, devices, capsys):
    file = tmp_path / "script.py"
    file.write_text(PROBLEM)
    model, loss, optimizer, data = load_problem(f"{file}:problem")
    plan = st.plan(model, loss, optimizer, data.abstract_batch, "data=8")
    st.fit(plan, data, 4, tmp_path / "run", progress=False)
    command = ["replay", str(tmp_path / "run"), "--devices", "8"]
    assert main([*command, "--problem", f"{file}:problem"]) == 1
    assert "first: batch x: row 3 on " in capsys.readouterr().out.replace("\n", " ")
    assert main([*command, "--problem", f"{file}:problem", "--step", "2"]) == 0
    assert "largest gradients" in capsys.readouterr().out
    assert main([*command, "--problem", f"{file}:no_loader"]) == 2
    assert "needs the st.DataLoader" in capsys.readouterr().err
    assert main(command) == 2
    assert "--problem FILE.py:NAME" in capsys.readouterr().err
