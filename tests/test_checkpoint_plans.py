"""Real plans: a checkpoint of any layout restores on any other, bit for bit."""

import jax
import numpy as np
import optax
import pytest
from checkpoint_states import assert_same_bits
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as hst

import shardtrain as st

WIDTH = 8

# strategy, number of devices: replicas, every ZeRO level, tensor, pipelines of 2 and 4 stages
LAYOUTS = [
    ("data=8", 8),
    ("data=2,fsdp=4,zero=1", 8),
    ("fsdp=4,tensor=2,zero=2", 8),
    ("data=2,fsdp=2,tensor=2", 8),
    ("data=2,pipeline=4,num_microbatches=2", 8),
    ("fsdp=2,pipeline=2,num_microbatches=2", 4),
    ("tensor=2", 2),
    ("data=1", 1),
]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(nnx.gelu(self.up(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(4)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["targets"], batch["mask"])


def make_plan(strategy, count):
    batch = {
        "tokens": np.zeros((16, 4), np.int32),
        "targets": np.zeros((16, 4), np.int32),
        "mask": np.ones((16, 4), np.float32),
    }
    devices = jax.devices()[:count]
    return st.plan(Model, loss_fn, optax.adam(1e-2), batch, strategy, devices=devices)


def randomized(state):
    """Every float of the state, moments too, made distinct; on the shardings it has."""
    rng = np.random.default_rng(0)

    def noise(leaf):
        if not jax.numpy.issubdtype(leaf.dtype, np.floating):
            return leaf
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(noise, state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, devices):
    """The same state, saved once from each layout: restored from one, saved by the next."""
    root = tmp_path_factory.mktemp("plans")
    plans = [make_plan(*layout) for layout in LAYOUTS]
    source = plans[-1]
    want = randomized(source.init(0))
    with st.Checkpointer(root / "first", source) as checkpointer:
        checkpointer.save(want)
    for number, plan in enumerate(plans):
        with st.Checkpointer(root / "first", plan) as checkpointer:
            state = checkpointer.restore()
        with st.Checkpointer(root / str(number), plan) as checkpointer:
            checkpointer.save(state)
    return root, plans, want


@settings(max_examples=40, deadline=None)
@given(hst.integers(0, len(LAYOUTS) - 1), hst.integers(0, len(LAYOUTS) - 1))
def test_any_layout_restores_any_other_bit_for_bit(runs, saved_by, restored_by):
    root, plans, want = runs
    plan = plans[restored_by]
    with st.Checkpointer(root / str(saved_by), plan) as checkpointer:
        state = checkpointer.restore()
    assert_same_bits(plan.to_checkpoint(state), want)
    for leaf, abstract in zip(
        jax.tree.leaves(state), jax.tree.leaves(plan.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)


def test_the_file_is_the_same_whoever_saved_it(runs):
    headers = [st.inspect(runs[0] / str(number)).header for number in range(len(LAYOUTS))]
    assert len({tuple(header.fingerprints.items()) for header in headers}) == 1
    assert len({str(header.leaves) for header in headers}) == 1
    assert {header.mesh["devices"] for header in headers} == {1, 2, 4, 8}
