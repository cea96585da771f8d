"""Compiler bugs that give wrong numbers, reproduced in plain JAX, and our way round them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain.errors import CompilerBugError
from shardtrain.plan.convolutions import (
    rewrite_convolutions,
    with_mapped_gradients,
    with_mapped_kernels,
)


def convolve(x, kernel, groups, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    numbers = options.pop("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    return lax.conv_general_dilated(
        x, kernel, dimension_numbers=numbers, feature_group_count=groups, **options
    )


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernel_gradient_on(devices, groups, batch_axes, wrap=lambda f: f):
    mesh = Mesh(
        np.array(devices).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    x, kernel = numbers(8, 4, 4, 4), numbers(3, 3, 4 // groups, 8, seed=1)
    loss = wrap(lambda kernel, x: jnp.sum(jnp.tanh(convolve(x, kernel, groups)) ** 2))
    placed = [NamedSharding(mesh, P()), NamedSharding(mesh, P(batch_axes))]
    sharded = jax.jit(jax.grad(loss), in_shardings=placed, out_shardings=placed[0])(kernel, x)
    return np.asarray(sharded), np.asarray(jax.jit(jax.grad(loss))(kernel, x))


def test_grouped_convolution_bug_is_still_there(devices):
    """When this fails, the compiler was mended and `known_bugs` can go."""
    found, wanted = kernel_gradient_on(devices, groups=2, batch_axes="data")
    np.testing.assert_allclose(found, 2 * wanted, rtol=1e-4, atol=1e-4)


def test_grouped_convolution_is_right_when_no_axis_is_idle(devices):
    found, wanted = kernel_gradient_on(devices, groups=2, batch_axes=("data", "tensor"))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [2, 4])
def test_own_kernel_gradient_is_right_on_the_same_mesh(devices, groups):
    found, wanted = kernel_gradient_on(devices, groups, "data", wrap=rewrite_convolutions)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def gathers_on(devices, groups, wrap=lambda f: f):
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = numbers(16, 4, 4, 8), numbers(3, 3, 8 // groups, 8, seed=1)
    run = jax.grad(wrap(lambda x, kernel: jnp.sum(jnp.tanh(convolve(x, kernel, groups)))))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    jitted = jax.jit(run, in_shardings=(rows, whole), out_shardings=rows)
    return "all-gather" in jitted.lower(x, kernel).compile().as_text()


def test_batch_of_a_grouped_convolution_is_gathered_by_the_compiler_not_by_us(devices):
    assert gathers_on(devices, groups=2)  # when this fails, the compiler was mended
    assert not gathers_on(devices, groups=8)
    assert not gathers_on(devices, groups=2, wrap=rewrite_convolutions)


@pytest.mark.parametrize(
    ("shape", "kernel", "groups", "options"),
    [
        ((2, 7, 6, 4), (3, 2, 1, 8), 4, {"padding": "VALID", "window_strides": (2, 1)}),
        ((2, 7, 6, 6), (3, 3, 2, 3), 3, {"rhs_dilation": (2, 1)}),
        ((2, 5, 4, 4), (2, 2, 2, 4), 2, {"lhs_dilation": (2, 3), "padding": [(1, 0), (2, 1)]}),
        ((2, 6, 5, 4), (3, 3, 2, 4), 2, {"padding": [(-1, 2), (0, -1)]}),
        (
            (2, 4, 6, 5),
            (8, 2, 3, 3),
            2,
            {"dimension_numbers": ("NCHW", "OIHW", "NCHW"), "window_strides": (2, 2)},
        ),
        ((2, 7, 6, 3), (3, 2, 3, 4), 1, {"window_strides": (2, 1)}),
        ((2, 8, 7, 3), (2, 3, 3, 4), 1, {"padding": "VALID", "window_strides": (2, 3)}),  # patches
        ((2, 8, 6, 4), (2, 3, 2, 4), 2, {"padding": "VALID", "window_strides": (2, 3)}),
        (
            (2, 9, 4),
            (4, 1, 4),
            4,
            {"dimension_numbers": ("NHC", "HIO", "NHC"), "window_strides": (1,)},
        ),
    ],
)
def test_rewritten_convolution_equals_jax(shape, kernel, groups, options):
    """The convolution as contractions, and with its own kernel gradient alone."""
    x, k = numbers(*shape), numbers(*kernel, seed=1)
    loss = lambda k, x: jnp.sum(jnp.sin(convolve(x, k, groups, **options)))
    wanted = jax.value_and_grad(loss, argnums=(0, 1))(k, x)
    for rule in (with_mapped_gradients, with_mapped_kernels):
        found = jax.value_and_grad(rewrite_convolutions(loss, rule), argnums=(0, 1))(k, x)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_rewriting_goes_into_scan_remat_jit_and_cond():
    kernels = numbers(3, 3, 2, 4)
    stacked = jnp.stack([kernels, 2 * kernels])

    def loss(stacked, x):
        block = jax.checkpoint(jax.jit(lambda x, k: jnp.tanh(convolve(x, k, 2))))
        body = lambda x, k: (block(x, k), jnp.sum(x))
        x, sums = lax.scan(body, x, stacked)
        y = lax.cond(jnp.sum(x) > -1e9, lambda x: convolve(x, stacked[0], 2), lambda x: x, x)
        return jnp.sum(y**2) + jnp.sum(sums)

    x = numbers(2, 4, 4, 4, seed=2)
    safe = rewrite_convolutions(loss)
    np.testing.assert_allclose(jax.grad(safe)(stacked, x), jax.grad(loss)(stacked, x), rtol=1e-4)
    assert "batch_group_count=2" in str(jax.make_jaxpr(jax.grad(loss))(stacked, x))
    assert "batch_group_count=2" not in str(jax.make_jaxpr(jax.grad(safe))(stacked, x))


class Depthwise(nnx.Module):
    def __init__(self, *, rngs):
        self.depthwise = nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.depthwise(x)).mean(axis=(1, 2)))


def test_plan_gives_right_gradients_with_an_idle_axis(devices):
    batch = {"image": numbers(8, 4, 4, 4), "label": jnp.arange(8)}
    loss = lambda model, batch: st.cross_entropy(model(batch["image"]), batch["label"])
    grads = []
    for strategy, used in (("data=1", devices[:1]), ("data=4,context=2", devices)):
        plan = st.plan(
            lambda rngs: Depthwise(rngs=rngs),
            loss,
            optax.sgd(1.0),
            batch,
            st.Strategy.parse(strategy).replace(rules={"batch/**": (("data",),)}),
            devices=used,
        )
        state = plan.init(0)
        before = np.asarray(state.params["depthwise"]["kernel"])
        state, metrics = plan.step(state, batch)
        grads.append((before - np.asarray(state.params["depthwise"]["kernel"]), metrics))
    (one, one_metrics), (many, many_metrics) = grads
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(many_metrics["grad_norm"], one_metrics["grad_norm"], rtol=1e-5)


def test_gradient_inside_the_loss_is_refused_by_name(devices):
    def loss(variables, batch):
        score = lambda k: jnp.sum(convolve(batch["x"], k, 2) ** 2)
        return st.Mean(jnp.sum(jax.grad(score)(variables["k"]) ** 2), 8.0)

    model = st.Functional(init=lambda key: {"k": jax.random.normal(key, (3, 3, 2, 4))})
    batch = {"x": numbers(8, 4, 4, 4)}
    strategy = st.Strategy(data=4, context=2, rules={"batch/**": (("data",),)})
    with pytest.raises(CompilerBugError, match=r"test_known_bugs.py.*batch_group_count.*'context'"):
        st.plan(model, loss, optax.sgd(1.0), batch, strategy)


class Several(nnx.Module):
    """Patches, a strided, a grouped and a transposed convolution, and dropout."""

    def __init__(self, *, rngs):
        self.patches = nnx.Conv(3, 4, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.strided = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 8, (2, 2), strides=(2, 2), rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.strided(nnx.gelu(self.patches(x))))
        x = self.dropout(nnx.gelu(self.grouped(x)))
        return self.up(x).mean(axis=(1, 2))


IMAGES = {"image": numbers(16, 8, 8, 3), "label": jnp.arange(16) % 8}


def several_plan(strategy, **options):
    loss = lambda model, batch: st.cross_entropy(model(batch["image"]), batch["label"])
    strategy = st.Strategy.parse(strategy).replace(allow_replicated=("**",), **options)
    return st.plan(lambda rngs: Several(rngs=rngs), loss, optax.adam(1e-2), IMAGES, strategy)


@pytest.mark.parametrize(
    "strategy", ["data=4,tensor=2,num_microbatches=2", "data=2,fsdp=4,zero=1,num_microbatches=2"]
)
def test_microbatches_of_convolutions_reduce_once_per_step(devices, strategy):
    plan = several_plan(strategy)
    assert plan.gradients.reason == ""
    inside = [c for c in plan.collectives() if c.in_loop]
    assert not [c for c in inside if {"data", "fsdp"} & set(c.axes)], inside
    st.verify(plan, num_steps=1).raise_if_failed()


def test_convolution_with_too_many_offsets_reduces_in_each_microbatch(devices):
    loss = lambda v, b: st.Mean(jnp.sum(convolve(b["x"], v["k"], 1) ** 2), b["x"].shape[0] * 1.0)
    model = st.Functional(init=lambda key: {"k": jax.random.normal(key, (13, 13, 2, 2))})
    batch = {"x": numbers(16, 4, 4, 2)}
    plan = st.plan(model, loss, optax.sgd(0.1), batch, "data=8,num_microbatches=2")
    assert "169 kernel offsets" in plan.gradients.reason
    assert "test_known_bugs.py" in plan.gradients.reason
