"""Linen, NNX and plain functions in one functional form."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import LossContractError, ModelError
from shardtrain.modules import model_form
from shardtrain.modules.intercept import Calls, repeated
from shardtrain.pytree import abstract, leaves_by_path

X = np.linspace(-1, 1, 8 * 4, dtype=np.float32).reshape(8, 4)
BATCH = {"x": X}
SGD = optax.sgd(0.1)


def form_of(model, loss):
    return model_form(model, lambda m, b: loss(m, b), abstract(BATCH))


def total(model, batch):
    return jnp.sum(model(batch["x"]))


# -- what is a model ----------------------------------------------------------------------------


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def test_kinds_and_names():
    init = lambda key: {"w": jax.random.normal(key, (4,))}
    for model, kind, name in [
        (Dense(), "linen", "Dense"),
        (Linear, "nnx", "Linear"),
        (lambda rngs: Linear(rngs), "nnx", "Linear"),
        (Linear(nnx.Rngs(0)), "nnx", "Linear"),
    ]:
        form = form_of(model, total)
        assert (form.kind, form.name) == (kind, name)
        assert sorted(x.shape for x in jax.tree.leaves(form.abstract_params)) == [(4,), (4, 4)]
    form = form_of(st.Functional(init=init), lambda v, b: jnp.sum(b["x"] @ v["w"]))
    assert (form.kind, form.name) == ("functional", "Functional")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Dense, r"Dense is a Linen class; pass an instance: Dense\(\)"),
        (3, r"type builtins\.int is not supported.*flax\.nnx\.Module"),
        ({"w": jnp.ones(3)}, r"type builtins\.dict is not supported.*st\.Functional"),
        (
            lambda rngs: {"w": 1},
            r"returned dict when given nnx\.Rngs; it must return an nnx\.Module",
        ),
        (lambda rngs: Dense(), "returned Dense when given"),
        (st.Functional(init=lambda: {}), r"Functional\.init\(key\) failed"),
        (st.Functional(init=lambda key: {}), "Functional has no parameters to train"),
        (
            st.Functional(init=lambda key: {"n": jnp.arange(3)}),
            "parameter n has dtype int32: only floating-point parameters",
        ),
    ],
)
def test_wrong_models_are_named(model, message):
    with pytest.raises(ModelError, match=message):
        form_of(model, lambda m, b: jnp.sum(b["x"]))


def test_a_loss_that_never_calls_a_linen_model():
    with pytest.raises(ModelError, match="Dense created no parameters when loss_fn called it"):
        form_of(Dense(), lambda m, b: jnp.sum(b["x"]))


def test_an_abstract_nnx_module_is_refused_with_the_remedy():
    module = nnx.eval_shape(lambda: Linear(nnx.Rngs(0)))
    with pytest.raises(ModelError, match=r"linear/.* has no value .*Pass a factory instead"):
        form_of(module, total)


def test_an_nnx_module_without_parameters():
    class Empty(nnx.Module):
        def __call__(self, x):
            return x

    with pytest.raises(ModelError, match="Empty has no parameters"):
        form_of(Empty(), total)


# -- factories ----------------------------------------------------------------------------------


def test_a_factory_is_never_materialised():
    """64 TiB of parameters: planning, explaining and pricing them must allocate nothing."""
    seen = []

    class Huge(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (1 << 22, 1 << 22)))
            seen.append(isinstance(self.w[...], jax.core.Tracer))

        def __call__(self, x):
            return x @ self.w[...][:4]

    model = lambda rngs: Huge(rngs)
    plan = st.plan(model, total, SGD, BATCH, "fsdp=8", hardware="cpu:8")
    assert plan.memory().params == 4 * (1 << 44) // 8
    assert "P('fsdp')" in str(plan.explain())
    assert all(seen)


def test_parameters_are_born_in_their_shards(devices):
    class Wide(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 64)))

        def __call__(self, x):
            return x @ self.w[...]

    plan = st.plan(Wide, total, SGD, BATCH, "fsdp=8")
    w = plan.init(3).params["w"]
    assert {s.data.shape for s in w.addressable_shards} == {(4, 8)}
    eager = Wide(nnx.Rngs(jax.random.key(3))).w[...]
    np.testing.assert_array_equal(np.asarray(w), np.asarray(eager))


def test_linen_parameters_equal_the_authors_own_init(devices):
    plan = st.plan(Dense(), total, SGD, BATCH, "data=8")
    found = plan.init(5).params["Dense_0"]["kernel"]
    wanted = Dense().init(jax.random.key(5), X)["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


# -- NNX instances ------------------------------------------------------------------------------


def test_an_nnx_instance_is_neither_changed_nor_donated(devices):
    module = Linear(nnx.Rngs(0))
    before = np.asarray(module.linear.kernel[...])
    plan = st.plan(module, total, optax.sgd(1.0), BATCH, "data=8")
    state = plan.init()
    np.testing.assert_array_equal(np.asarray(state.params["linear"]["kernel"]), before)
    for _ in range(2):
        state, _ = plan.step(state, BATCH)
    np.testing.assert_array_equal(np.asarray(module.linear.kernel[...]), before)
    assert np.abs(np.asarray(state.params["linear"]["kernel"]) - before).max() > 0.1


def test_one_device_does_not_donate_the_instance_either(devices):
    """On one device `device_put` could alias the user's own arrays."""
    module = Linear(nnx.Rngs(0))
    plan = st.plan(module, total, SGD, BATCH, "data=1", devices=devices[:1])
    plan.step(plan.init(), BATCH)
    variables = {"params": {"linear": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}}
    given = variables["params"]
    plan.step(plan.init(variables=given), BATCH)
    assert float(given["linear"]["kernel"].sum()) == 16.0
    assert module.linear.kernel[...].shape == (4, 4)
    assert float(module(X).sum()) == float(module(X).sum())


# -- mutable state ------------------------------------------------------------------------------


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        self.sow("intermediates", "seen", x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)


def test_linen_batch_statistics_are_carried_and_sown_values_are_not():
    form = form_of(Norm(), lambda m, b: jnp.sum(m(b["x"], train=True)))
    assert list(form.abstract_variables) == ["batch_stats"]
    params, variables = form.init(jax.random.key(0))
    call = lambda m, x: m(x, train=True)
    out, new = form.apply(call, params, variables, jax.random.key(1), True, (X,), Calls())
    _, wanted = Norm().apply(
        {"params": params, **variables}, X, train=True, mutable=["batch_stats"]
    )
    assert new.keys() == variables.keys()
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], wanted["batch_stats"])
    assert out.shape == (8, 4)


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(4))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.bn = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        self.sow(nnx.Intermediate, "seen", x)
        return self.bn(x * self.w[...])


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_nnx_state_is_carried_and_sown_values_are_not():
    form = form_of(Counting, total)
    params, variables = form.init(jax.random.key(0))
    out = form.apply(lambda m, x: m(x), params, variables, jax.random.key(1), True, (X,), Calls())
    assert leaves_by_path(out[1]).keys() == leaves_by_path(variables).keys()
    assert int(out[1]["calls"]) == 1
    np.testing.assert_allclose(out[1]["bn"]["mean"], 0.5 * X.mean(0), rtol=1e-5, atol=1e-6)
    evaluated = form.apply(
        lambda m, x: m(x), params, variables, jax.random.key(1), False, (X,), Calls()
    )
    np.testing.assert_array_equal(evaluated[1]["bn"]["mean"], np.zeros(4))


def test_an_nnx_module_that_grows_variables_is_refused(devices):
    class Growing(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones(4))
            self.cache = nnx.data(None)

        def __call__(self, x):
            self.cache = nnx.Variable(x)
            return x * self.w[...]

    with pytest.raises(ModelError, match=r"Growing changed its variables .*new: cache.*__init__"):
        st.plan(Growing, total, SGD, BATCH, "data=8")


def test_functional_variables_are_carried_through_aux(devices):
    def loss(variables, batch, rngs):
        error = batch["x"] @ variables["params"]["w"] - 1.0
        noise = jax.random.normal(rngs.noise(), ())
        new = {"seen": variables["seen"] + batch["x"].shape[0], "noise": noise}
        return st.Mean(jnp.sum(error**2), error.size), st.Aux(
            variables=new, metrics={"worst": jnp.max(error**2)}
        )

    init = lambda key: {
        "params": {"w": jnp.zeros(4)},
        "seen": jnp.zeros((), jnp.int32),
        "noise": jnp.zeros(()),
    }
    plan = st.plan(st.Functional(init=init), loss, SGD, BATCH, "data=8")
    state = plan.init(0)
    noise = []
    for _ in range(2):
        state, metrics = plan.step(state, BATCH)
        noise.append(float(state.variables["noise"]))
    assert int(state.variables["seen"]) == 16
    assert noise[0] != noise[1]
    assert set(metrics) == {"loss", "grad_norm", "weight", "skipped", "worst"}
    assert set(plan.model(state)) == {"params", "seen", "noise"}


# -- loss signatures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [3, lambda model: 0.0, lambda: 0.0, lambda a, b, c, d: 0.0],
    ids=["not callable", "one argument", "none", "four"],
)
def test_wrong_loss_signatures(loss):
    with pytest.raises(LossContractError, match="loss_fn"):
        st.plan(Dense(), loss, SGD, BATCH, "data=8", hardware="cpu:8")


def test_reserved_metric_names_are_refused(devices):
    loss = lambda m, b: (st.Mean(total(m, b), 8.0), {"grad_norm": jnp.float32(0)})
    plan = st.plan(Dense(), loss, SGD, BATCH, "data=8")
    state = plan.init()
    with pytest.raises(LossContractError, match="metric name 'grad_norm' is shardtrain's own"):
        plan.step(state, BATCH)


# -- repeated blocks ----------------------------------------------------------------------------


def test_repeated_blocks_are_the_outermost_numbered_siblings():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.Dense(4)(x))

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = Block(name=f"block_{i}")(x)
            return nn.Dense(4)(x)

    assert form_of(Stack(), total).blocks == ("block_0", "block_1", "block_2")
    # Two leaf layers are no blocks: there is nothing in them to recompute.
    assert form_of(Block(), total).blocks == ()


def test_repeated_needs_two_of_one_class_and_stem():
    assert repeated([(("a0",), int), (("b1",), int)]) == {}
    assert repeated([(("a0",), int), (("a1",), str)]) == {}
    assert list(repeated([(("layers", 0), int), (("layers", 1), int)])) == [
        ("layers", 0),
        ("layers", 1),
    ]
