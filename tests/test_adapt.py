"""Fine-tuning: frozen parameters and low-rank corrections, on unmodified models and every axis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from zoo import ZOO

import shardtrain as st
from shardtrain.errors import ModelError
from shardtrain.modules.low_rank import LowRank, evaluate_low_rank
from shardtrain.pytree import leaves_by_path, tree_bytes

GPT = ZOO["gpt"]
BATCH = GPT.batch(16, 0)


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tuned(strategy, model=None, optimizer=None, case=GPT, **options):
    model = st.lora(case.make(), rank=2, **options) if model is None else model
    return st.plan(model, case.loss, optimizer or optax.adam(1e-2), case.batch(16, 0), strategy)


# -- products ---------------------------------------------------------------------------------


def low_rank(inputs, outputs, rank=2):
    weight, a, b = (
        numbers(*inputs, *outputs),
        numbers(*inputs, rank, seed=1),
        numbers(rank, *outputs, seed=2),
    )
    dims = tuple(range(weight.ndim))
    return LowRank(weight, a, b, dims[: len(inputs)], dims[len(inputs) :], 0.5)


def matmuls_of_size(fn, size, *args):
    """Products whose result has at least `size` numbers."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.outvars[0].aval.size
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from walk(sub)

    return [n for n in walk(jax.make_jaxpr(fn)(*args).jaxpr) if n >= size]


PRODUCTS = {
    "x w": (lambda w, x: x @ w, (8,), (9,), (3, 8)),
    "w.T x": (lambda w, x: w.T @ x, (8,), (9,), (8, 3)),
    "x w.T": (lambda w, x: x @ w.T, (8,), (9,), (3, 9)),
    "embed to heads": (lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (8,), (3, 4), (3, 8)),
    "heads first": (lambda w, x: jnp.einsum("bd,dhk->hbk", x, w), (8,), (3, 4), (3, 8)),
    "heads to embed": (lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), (3, 4), (8,), (3, 3, 4)),
    "outputs reordered": (
        lambda w, x: jnp.einsum("bd,khd->bkh", x, jnp.transpose(w, (2, 1, 0))),
        (8,),
        (3, 4),
        (3, 8),
    ),
    "split and merged": (lambda w, x: x @ w.reshape(8, 3, 4).reshape(8, 12), (2, 4), (12,), (3, 8)),
    "in a scan": (
        lambda w, x: lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=2)[0],
        (8,),
        (8,),
        (3, 8),
    ),
    "recomputed": (lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), (8,), (9,), (3, 8)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_equals_that_with_the_sum(name):
    fn, inputs, outputs, shape = PRODUCTS[name]
    w, x = low_rank(inputs, outputs), numbers(*shape, seed=3)
    loss = lambda dense: lambda a, b, x: jnp.sum(jnp.sin(dense(a, b, x)))
    make = lambda a, b: LowRank(w.weight, a, b, w.inputs, w.outputs, w.scale)
    thin = loss(lambda a, b, x: evaluate_low_rank(fn, make(a, b), x))
    full = loss(lambda a, b, x: fn(make(a, b).dense(), x))
    gradients = lambda fn: jax.value_and_grad(fn, argnums=(0, 1, 2))
    found = gradients(thin)(w.a, w.b, x)
    wanted = gradients(full)(w.a, w.b, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, wanted)
    assert not matmuls_of_size(gradients(thin), w.weight.size, w.a, w.b, x)
    assert matmuls_of_size(gradients(full), w.weight.size, w.a, w.b, x)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ jnp.tanh(w),
        lambda w, x: x @ w[:, ::-1],
        lambda w, x: x @ (w @ w.T),
        lambda w, x: (x[:, :4] @ w.reshape(4, 18)).sum(),
        lambda w, x: jnp.sum(w[jnp.array([0, 2])]) * x,
        lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: -x @ w, w),
    ],
)
def test_any_other_use_gets_the_sum(fn):
    w, x = low_rank((8,), (9,)), numbers(3, 8, seed=3)
    np.testing.assert_allclose(evaluate_low_rank(fn, w, x), fn(w.dense(), x), rtol=2e-5, atol=2e-5)


# -- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "strategy"),
    [
        ("gpt", "data=2,fsdp=2,tensor=2"),
        ("gpt", "data=2,tensor=2,pipeline=2,num_microbatches=2"),
        ("scan-nnx-targets", "fsdp=4,tensor=2,num_microbatches=2"),
        ("lstm", "data=8"),
    ],
)
def test_every_layout_equals_one_device(devices, case, strategy):
    plan = tuned(strategy, case=ZOO[case])
    st.verify(plan, num_steps=1).raise_if_failed()


def test_only_corrections_have_gradients_and_optimizer_state(devices):
    plan = tuned("data=8")
    state = plan.abstract_state
    assert all(p.endswith(("lora_a", "lora_b")) for p in leaves_by_path(state.params))
    trained = tree_bytes(state.params)
    assert tree_bytes(state.opt_state) == 2 * trained + 4  # Adam's moments and its count
    base = st.plan(GPT.make(), GPT.loss, optax.adam(1e-2), BATCH, "data=8").abstract_state
    assert tree_bytes(state.variables["frozen"]) == tree_bytes(base.params)
    reduced = sum(c.bytes * c.count for c in plan.collectives() if c.kind == "all-reduce")
    assert trained <= reduced <= trained + 64  # and a few scalars


def test_frozen_parameters_are_sharded_like_trained_ones(devices):
    base = st.plan(GPT.make(), GPT.loss, optax.adam(1e-2), BATCH, "fsdp=2,tensor=4")
    plan = tuned("fsdp=2,tensor=4")
    specs = lambda tree: {p: x.sharding.spec for p, x in leaves_by_path(tree).items()}
    mine = specs(plan.abstract_state.variables["frozen"])
    theirs = specs(base.abstract_state.params)
    kernels = [p for p in theirs if p.endswith("kernel")]
    assert len(kernels) > 4
    assert {p: mine[p] for p in kernels} == {p: theirs[p] for p in kernels}
    a, b = (plan.layout.params[f"blocks/0/up/kernel/lora_{x}"].compute for x in "ab")
    assert (tuple(a), tuple(b)) == ((), (None, "tensor"))


def test_it_starts_as_the_model_and_gives_it_back_corrected(devices):
    case = ZOO["llama"]  # without dropout
    batch = case.batch(16, 0)
    base = st.plan(case.make(), case.loss, optax.adam(1e-2), batch, "data=8")
    plan = tuned("data=4,tensor=2", case=case)
    values = base.model(base.init(5))
    state = plan.init(1, variables=values)
    state, metrics = plan.step(state, batch)
    _, wanted = base.step(base.init(5), batch)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
    for _ in range(3):
        state, metrics = plan.step(state, batch)
    assert metrics["loss"] < wanted["loss"]
    again = base.init(variables=plan.model(state))  # merged: the author's own model
    _, merged = base.step(again, batch)
    _, adapted = plan.step(state, batch)
    np.testing.assert_allclose(merged["loss"], adapted["loss"], rtol=1e-5)


def test_corrections_differ_by_seed_and_values_given_with_the_model_stay(devices):
    module = GPT.make()(nnx.Rngs(3))
    plan = tuned("fsdp=8", model=st.lora(module, rank=2))
    one, other = plan.init(0), plan.init(1)
    a = lambda state: np.asarray(state.params["blocks"]["0"]["up"]["kernel"]["lora_a"])
    assert np.abs(a(one) - a(other)).max() > 0.01
    frozen = leaves_by_path(jax.device_get(other.variables["frozen"]))
    given = leaves_by_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    assert frozen.keys() == given.keys()
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, given[path])


def test_freeze_equals_an_optimizer_that_leaves_them_alone(devices):
    label = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: "off" if "blocks" in jax.tree_util.keystr(path) else "on", params
    )
    masked = optax.multi_transform({"on": optax.adam(1e-2), "off": optax.set_to_zero()}, label)
    plan = tuned("data=2,fsdp=4", model=st.freeze(GPT.make(), "blocks/**"))
    other = st.plan(GPT.make(), GPT.loss, masked, BATCH, "data=1", devices=devices[:1])
    state, theirs = plan.init(2), other.init(2)
    start = jax.device_get(state.variables["frozen"])
    for _ in range(3):
        state, _ = plan.step(state, BATCH)
        theirs, _ = other.step(theirs, BATCH)
    wanted = leaves_by_path(theirs.params)
    for path, leaf in leaves_by_path(state.params).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=2e-4, atol=2e-5, err_msg=path)
    jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(state.variables["frozen"]))
    assert not any(p.startswith("blocks") for p in leaves_by_path(state.params))


def test_frozen_in_bfloat16_is_half_the_memory_and_trains(devices):
    plan = tuned("fsdp=8", model=st.lora(GPT.make(), 2, dtype=jnp.bfloat16, train="**/bias"))
    state = plan.init()
    kept = leaves_by_path(state.variables["frozen"])
    assert {x.dtype for x in kept.values()} == {jnp.dtype(jnp.bfloat16)}
    assert not any(p.endswith("bias") for p in kept)
    losses = []
    for _ in range(6):
        state, metrics = plan.step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_a_checkpoint_resumes_on_another_layout(devices, tmp_path):
    plan = tuned("data=2,tensor=4")
    state, _ = plan.step(plan.init(), BATCH)
    with st.Checkpointer(tmp_path, plan) as saver:
        saver.save(state)
    other = tuned("fsdp=8")
    with st.Checkpointer(tmp_path, other) as saver:
        restored = saver.restore()
    wanted = leaves_by_path(jax.device_get(plan.to_checkpoint(state)).params)
    for path, leaf in leaves_by_path(jax.device_get(restored.params)).items():
        np.testing.assert_array_equal(leaf, wanted[path])


def test_replicas_of_an_adapted_model_agree_in_int8(devices):
    plan = tuned(st.Strategy(data=4, tensor=2, compression=st.Int8()))
    state = plan.init()
    first = None
    for _ in range(4):
        state, metrics = plan.step(state, BATCH)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < first
    assert not st.replica_divergence(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: st.lora(m, 2, targets="**/kernle"), "matches no parameter"),
        (lambda m: st.lora(m, 2, targets="**/bias"), "needs a matrix"),
        (lambda m: st.lora(m, 4096), "rank 4096 is larger than the matrix. Use rank <="),
        (lambda m: st.freeze(m, "block/**"), "matches no parameter"),
        (lambda m: st.freeze(m, "**"), "no parameters to train"),
        (lambda m: st.lora(m, 0), "at least 1"),
        (lambda m: st.freeze(m), "globs"),
    ],
)
def test_what_cannot_be_adapted_is_said_by_name(make, message):
    with pytest.raises(ModelError, match=message):
        tuned("data=8", model=make(GPT.make()))


def test_a_pipeline_finds_blocks_of_which_nothing_is_trained(devices):
    """Here the embedding and the head are trained, through stages that are not."""
    case = ZOO["llama-targets"]
    plan = tuned(
        "data=4,pipeline=2,num_microbatches=2", st.freeze(case.make(), "layers/**"), case=case
    )
    st.verify(plan, num_steps=1).raise_if_failed()
