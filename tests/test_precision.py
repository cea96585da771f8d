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


class Promoting(nnx.Module):
    """What brings float32 back: an embedding, a table of angles, the first state of a loop."""

    def __init__(self, rngs, head_dtype=None):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)
        self.cell = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 8, dtype=head_dtype, rngs=rngs)

    def __call__(self, tokens):
        angles = jnp.cos(jnp.arange(8) / 8.0)
        x = self.hidden(self.embed(tokens) * angles)

        def step(h, x):
            h = jnp.tanh(self.cell(jnp.concatenate([h, x], axis=-1)))
            return h, None

        h, _ = jax.lax.scan(step, jnp.zeros((tokens.shape[0], 8)), x.swapaxes(0, 1))
        return self.head(h)


class Carrying(nnx.Module):
    """A loop carries what the embedding gives, and makes it float32."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)
        self.tail = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens):
        scale = jnp.linspace(0.5, 1.0, 8, dtype=jnp.float32)
        step = lambda x, _: (jnp.tanh(self.hidden(x)) * scale, None)
        x, _ = jax.lax.scan(step, self.embed(tokens), length=2)
        for layer in self.tail:
            x = layer(x)
        return x.mean(1)


class PromotingLinen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Dense(8)(nn.Embed(16, 8)(tokens) * jnp.cos(jnp.arange(8) / 8.0))
        x = nn.Conv(8, (2,))(x + jnp.ones((), jnp.float32))
        return nn.Dense(8)(x.mean(1))


TOKENS = {"tokens": RNG.integers(0, 16, (16, 4)), "y": BATCH["y"]}


def token_loss(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["y"])


@pytest.mark.parametrize(
    "model", [Promoting, Carrying, PromotingLinen()], ids=["nnx", "loop", "linen"]
)
def test_layers_multiply_in_bfloat16_whatever_reaches_them(devices, model):
    plan = st.plan(model, token_loss, optax.adam(1e-2), TOKENS, "data=8,precision=bf16")
    traced = jax.jit(plan.proof_loss).trace(*_arguments(plan))
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = re.findall(r"stablehlo\.(?:dot_general|convolution).*?: \((.*?)\) ->", program)
    dtypes = {tuple(re.findall(r"x(b?f\d+)>", operands)) for operands in found}
    assert len(found) >= 3
    assert dtypes == {("bf16", "bf16")}
    assert not plan.findings
    losses = []
    state = plan.init()
    for _ in range(20):
        state, metrics = plan.step(state, TOKENS)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def _arguments(plan):
    s = plan.abstract_state
    strip = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(strip, (s.params, s.variables, plan.layout.batch, s.rng))


def test_a_dtype_of_the_author_stays_and_is_said(devices):
    model = lambda rngs: Promoting(rngs, head_dtype=jnp.float32)
    plan = st.plan(model, token_loss, optax.adam(1e-2), TOKENS, "data=8,precision=bf16")
    (found,) = plan.findings
    assert re.search(r"precision=bf16: \d+% of the matmuls' FLOPs read float32, most at", found)
    assert "linear.py" in found or "test_precision.py" in found
    assert not st.plan(model, token_loss, optax.adam(1e-2), TOKENS, "data=8").findings


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
