"""bf16: float32 master parameters, bfloat16 matmuls, float32 sums."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st

RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(16, 32)).astype(np.float32),
    "y": RNG.integers(0, 8, 16).astype(np.int32),
    "mask": (RNG.random(16) < 0.7).astype(np.float32),
}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.relu(nn.Dense(64)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


SEEN = {}


def loss(model, batch):
    logits = model(batch["x"])
    SEEN.update(logits=logits.dtype, mask=batch["mask"].dtype, x=batch["x"].dtype)
    return st.cross_entropy(logits, batch["y"], batch["mask"])


@pytest.mark.parametrize("model", [Linen(), Nnx], ids=["linen", "nnx"])
def test_bf16_compute_float32_everything_else(devices, model):
    plan = st.plan(model, loss, optax.adam(1e-2), BATCH, "data=4,fsdp=2,precision=bf16")
    assert {x.dtype for x in jax.tree.leaves(plan.abstract_state.params)} == {jnp.dtype("float32")}
    state, metrics = plan.step(plan.init(0), BATCH)
    floats = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    # The user's own arrays are not cast: a bfloat16 mask would count 257 tokens as 256.
    assert {"logits": jnp.float32, "mask": jnp.float32, "x": jnp.float32} == SEEN
    assert float(metrics["weight"]) == BATCH["mask"].sum()
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32


ARRAY = r"tensor<[\dx]*x(\w+)>"
MATMUL = re.compile(rf"stablehlo\.dot_general .*: \({ARRAY}, {ARRAY}\) -> {ARRAY}")


@pytest.mark.parametrize(("precision", "short"), [("bf16", "bf16"), ("fp32", "f32")])
def test_every_matmul_reads_the_compute_dtype_and_weight_gradients_are_float32(
    devices, precision, short
):
    """As an accelerator would get it (XLA's CPU backend has no bfloat16 matmul into float32)."""
    plan = st.plan(Nnx, loss, optax.adam(1e-2), BATCH, f"data=8,precision={precision}")
    s = plan.abstract_state
    traced = jax.jit(plan.gradients.grad_fn).trace(s.params, s.variables, plan.layout.batch, s.rng)
    found = MATMUL.findall(traced.lower(lowering_platforms=("tpu",)).as_text())
    forward, kernels = (short, short, short), (short, short, "f32")
    # Two forward, one for the hidden layer's gradient, two for the kernels'.
    assert sorted(found) == sorted([forward] * 3 + [kernels] * 2)


def test_bf16_stays_near_float32(devices):
    found = {}
    for precision in ("fp32", "bf16"):
        plan = st.plan(Nnx, loss, optax.sgd(0.1), BATCH, f"data=8,precision={precision}")
        state = plan.init(0)
        for _ in range(5):
            state, metrics = plan.step(state, BATCH)
        found[precision] = float(metrics["loss"])
    assert found["bf16"] != found["fp32"]
    np.testing.assert_allclose(found["bf16"], found["fp32"], rtol=2e-2)


def test_small_updates_are_not_lost(devices):
    """1 + 1e-4 is 1 in bfloat16: only float32 masters can move so little."""
    model = st.Functional(init=lambda key: {"w": jnp.ones((32,))})
    slope = lambda v, b: st.Mean(jnp.sum(v["w"] * 1.0), 1.0)
    plan = st.plan(model, slope, optax.sgd(1e-4), BATCH, "data=8,precision=bf16")
    state = plan.init(0)
    for _ in range(10):
        state, _ = plan.step(state, BATCH)
    np.testing.assert_allclose(state.params["w"], 1 - 1e-3, rtol=1e-6)
