"""Dropout in microbatches: replicas draw what one device draws, and reduce once per step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st

WIDTH, ROWS, LENGTH = 8, 32, 6
RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
    "mask": (RNG.random(ROWS) < 0.8).astype(np.float32),
}


class NnxBlocks(nnx.Module):
    """A Python list of blocks; a mask per position, and one whose batch dim is folded away."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + self.dropout(jnp.tanh(layer(x)))
        flat = self.dropout(x.reshape(-1, WIDTH))
        return flat.reshape(x.shape)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dropout(0.4, deterministic=False)(jnp.tanh(nn.Dense(WIDTH)(x))), None


class LinenScan(nn.Module):
    """Scanned and rematerialised layers, and a second draw along another dim."""

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        x, _ = layers()(x, None)
        turned = nn.Dropout(0.3, deterministic=False)(jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(turned, 0, 1)


def keyed(model, batch, rngs):
    """Noise drawn by the loss itself, one key per example."""
    keys = jax.random.split(rngs.noise(), batch["x"].shape[0])
    noise = jax.vmap(lambda k: jax.random.normal(k, (LENGTH, WIDTH)))(keys)
    y = model(batch["x"] + 0.1 * noise).mean((1, 2)) ** 2
    return st.Mean(jnp.sum(y * batch["mask"]), jnp.sum(batch["mask"]))


def plain(model, batch):
    y = model(batch["x"]).mean((1, 2)) ** 2
    return st.Mean(jnp.sum(y * batch["mask"]), jnp.sum(batch["mask"]))


CASES = {
    "nnx list": (NnxBlocks, plain),
    "linen scan remat": (LinenScan(), plain),
    "a key per example": (NnxBlocks, keyed),
}


def plan_of(case, strategy, devices=None):
    model, loss = CASES[case]
    return st.plan(model, loss, optax.sgd(0.5), BATCH, strategy, devices=devices)


def trained(plan):
    state = plan.init(seed=3)
    state, metrics = plan.step(state, BATCH)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(
    "strategy", ["data=8,num_microbatches=2", "data=2,fsdp=2,zero=1,num_microbatches=2"]
)
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_one_device_and_one_reduction(devices, case, strategy):
    plan = plan_of(case, strategy, devices[: 8 if "8" in strategy else 4])
    assert plan.gradients.reason == "", plan.gradients.reason
    assert not [c for c in plan.collectives() if c.in_loop]
    one = plan_of(case, "data=1,num_microbatches=2", devices[:1])
    got, want = trained(plan), trained(one)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, got, want)


def test_masks_differ_between_replicas_and_draw_nothing_twice(devices):
    """The gradient of sum(dropout(x) * w) over x-independent w is the kept positions themselves."""

    class Kept(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.w = nnx.Param(jnp.zeros((ROWS, 4)))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, rows):
            return jnp.sum(self.dropout(jnp.ones((rows.shape[0], 4))) * (rows @ self.w[...]))

    batch = {"rows": np.eye(ROWS, dtype=np.float32)}
    loss = lambda model, batch: st.Mean(model(batch["rows"]), batch["rows"].sum())
    masks = []
    for strategy, count in (("data=8,num_microbatches=2", 8), ("data=1,num_microbatches=2", 1)):
        plan = st.plan(Kept, loss, optax.sgd(1.0), batch, strategy, devices=devices[:count])
        state, _ = plan.step(plan.init(), batch)
        masks.append(np.asarray(jax.tree.leaves(state.params)[0]) < 0)
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 40 < masks[0].sum() < 90  # 128 draws at rate one half, all different rows
    assert len({tuple(row) for row in masks[0]}) > 8


def test_one_row_per_replica(devices):
    """JAX writes a lookup of one row otherwise than of many: only the draws must correspond."""

    def loss(model, batch):
        y = model(batch["x"]).mean(1)
        return st.cross_entropy(y, jnp.zeros(y.shape[:1], jnp.int32))

    batch = {"x": BATCH["x"]}
    make = lambda s, used: st.plan(NnxBlocks, loss, optax.sgd(0.5), batch, s, devices=used)
    plan = make("data=8,num_microbatches=4", devices)
    one = make("data=1,num_microbatches=4", devices[:1])
    assert plan.gradients.reason == "", plan.gradients.reason
    params = [p.step(p.init(3), batch)[0].params for p in (plan, one)]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, *map(jax.device_get, params))


def test_a_draw_inside_a_custom_derivative_reduces_in_each_microbatch(devices):
    @jax.custom_vjp
    def noisy(x, key):
        return x * jax.random.bernoulli(key, 0.5, x.shape)

    noisy.defvjp(
        lambda x, key: (noisy(x, key), (x, key)),
        lambda saved, g: (g * jax.random.bernoulli(saved[1], 0.5, g.shape), None),
    )

    class Noisy(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x, key):
            return noisy(self.linear(x), key)

    def loss(model, batch, rngs):
        y = model(batch["x"], rngs.noise()).mean((1, 2)) ** 2
        return st.Mean(jnp.sum(y), batch["x"].shape[0])

    plan = st.plan(
        Noisy, loss, optax.sgd(0.5), BATCH, "data=4,num_microbatches=2", devices=devices[:4]
    )
    assert "test_draws.py" in plan.gradients.reason
    assert "inside custom_vjp" in plan.gradients.reason
    one = st.plan(
        Noisy, loss, optax.sgd(0.5), BATCH, "data=1,num_microbatches=2", devices=devices[:1]
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, trained(plan), trained(one))
