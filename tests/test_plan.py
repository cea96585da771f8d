"""What a plan promises: communication, recomputation, models given back, refusals by name."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from zoo import ZOO

import shardtrain as st
from shardtrain.errors import (
    MeshError,
    ModelError,
    ReplicationError,
    ShardtrainError,
    StrategyError,
    UnknownAxisError,
    UnusedRuleError,
)
from shardtrain.modules.intercept import remat_policy
from shardtrain.pytree import leaves_by_path

BATCH = {
    "x": np.linspace(-1, 1, 16 * 32, dtype=np.float32).reshape(16, 32),
    "mask": (np.arange(16) % 3 > 0).astype(np.float32),
}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.sin(self.up(x)))


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(32)(jnp.sin(nn.Dense(64)(x)))


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LinenBlock()(LinenBlock()(x))


def loss(model, batch):
    y = model(batch["x"]).mean(-1) ** 2
    return st.Mean(jnp.sum(y * batch["mask"]), jnp.sum(batch["mask"]))


def plan_of(strategy, model=Stack, optimizer=None, **options):
    return st.plan(model, loss, optimizer or optax.sgd(0.1), BATCH, strategy, **options)


# -- communication ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", ["data=8,num_microbatches=2", "data=2,fsdp=4,zero=1,num_microbatches=2"]
)
def test_microbatches_communicate_once_per_step(devices, strategy):
    """Gradients are added up on each device: nothing crosses the batch axes inside the loop."""
    plan = plan_of(strategy)
    assert plan.gradients.reason == ""
    found = plan.collectives()
    assert found
    inside = [c for c in found if c.in_loop]
    assert not [c for c in inside if {"data", "fsdp"} & set(c.axes)], inside
    assert not [c for c in found if c.kind in ("all-to-all", "collective-permute")], found
    assert any(c.kind in ("all-reduce", "reduce-scatter") and "data" in c.axes for c in found)


def test_fsdp_gathers_inside_the_loop_but_data_waits(devices):
    plan = plan_of("data=2,fsdp=4,num_microbatches=2")
    inside = [c for c in plan.collectives() if c.in_loop]
    assert {axes for c in inside for axes in c.axes} == {"fsdp"}
    assert "all-to-all" not in {c.kind for c in plan.collectives()}


def test_data_parallel_reduces_the_gradient_and_nothing_else(devices):
    plan = plan_of("data=8")
    found = plan.collectives()
    assert {c.kind for c in found} == {"all-reduce"}
    weights = sum(x.size * 4 for x in jax.tree.leaves(plan.abstract_state.params))
    total = sum(c.bytes * c.count for c in found)
    assert weights <= total <= weights + 64  # and a few scalars


def test_a_model_that_couples_the_batch_says_why_it_reduces_in_the_loop(devices):
    case = ZOO["conv-batchnorm"]
    plan = st.plan(
        case.make(), case.loss, optax.sgd(0.1), case.batch(16, 0), "data=8,num_microbatches=2"
    )
    assert plan.gradients.local_axes == ()
    assert "gradients are reduced in each of 2 microbatches" in str(plan.explain())


# -- recomputation ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Stack, LinenStack()], ids=["nnx", "linen"])
def test_remat_recomputes_each_block_and_changes_no_number(devices, model):
    results = {}
    for remat in ("none", "full", "dots", "dots_no_batch"):
        plan = plan_of(f"data=1,remat={remat}", model, devices=devices[:1])
        state = plan.abstract_state
        text = str(
            jax.make_jaxpr(plan.gradients.grad_fn)(
                state.params, state.variables, plan.layout.batch, state.rng
            )
        )
        # sin is computed once per block, and once more per block where it is recomputed.
        results[remat] = (text.count(" sin "), text.count("prevent_cse="))
    assert results["none"] == (2, 0)
    assert results["full"] == (4, 2)
    assert results["dots"] == (4, 2)
    assert results["dots_no_batch"] == (4, 2)


def test_policies_for_matmuls_keep_fused_attention(devices):
    """cuDNN's kernel cannot be traced without cuDNN: the policy is asked by name."""
    for name in ("dots", "dots_no_batch"):
        policy = remat_policy(name)
        assert policy(SimpleNamespace(name="dot_product_attention_fwd_wrapper"))
        assert not policy(jax.lax.sin_p)
    assert remat_policy("full") is None


def test_remat_of_a_model_without_blocks_covers_the_whole_loss(devices):
    model = st.Functional(init=lambda key: {"w": jnp.ones((32,))})
    fn = lambda v, b: st.Mean(jnp.sum(jnp.sin(b["x"] @ v["w"])), 16.0)
    plan = st.plan(model, fn, optax.sgd(0.1), BATCH, "data=8,remat=full")
    s = plan.abstract_state
    jaxpr = jax.make_jaxpr(plan.gradients.grad_fn)(s.params, s.variables, plan.layout.batch, s.rng)
    assert "prevent_cse=" in str(jaxpr)


# -- the model back -----------------------------------------------------------------------------


def test_nnx_model_comes_back_as_a_module(devices):
    plan = plan_of("data=2,fsdp=4")
    state, _ = plan.step(plan.init(0), BATCH)
    module = plan.model(state)
    assert isinstance(module, Stack)
    wanted = np.asarray(plan.call(state, lambda model, x: model(x), BATCH["x"]))
    plan.step(state, BATCH)
    np.testing.assert_allclose(np.asarray(module(BATCH["x"])), wanted, rtol=1e-5, atol=1e-5)
    module.blocks[0].up.kernel[...] = jnp.zeros((32, 64))  # its own arrays: may be changed


def test_linen_model_comes_back_with_its_variables(devices):
    plan = plan_of("data=2,fsdp=4", LinenStack())
    state = plan.init(0)
    module, variables = plan.model(state)
    out = module.apply(variables, BATCH["x"])
    wanted = plan.call(state, lambda model, x: model(x), BATCH["x"])
    np.testing.assert_allclose(np.asarray(out), np.asarray(wanted), rtol=1e-5, atol=1e-5)
    again = plan.init(variables=variables)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_call_traces_once_per_function_and_takes_pytrees(devices):
    plan = plan_of("data=8")
    state = plan.init(0)
    fn = lambda model, inputs: {"y": model(inputs["x"]), "n": inputs["n"] + 1}
    for n in (1, 2):
        out = plan.call(state, fn, {"x": BATCH["x"][:3], "n": n})
    assert int(out["n"]) == 3
    assert out["y"].shape == (3, 32)
    assert plan.trace_counts["call"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"params": {}}, r"missing: .*kernel"),
        ({"params": {"LinenBlock_0": {}, "other": np.ones(3)}}, r"unknown: other"),
    ],
)
def test_values_of_another_model_are_refused(devices, values, message):
    plan = plan_of("data=8", LinenStack())
    with pytest.raises(
        ModelError, match=rf"the given params are not LinenStack's:[\s\S]*{message}"
    ):
        plan.init(variables=values)


def test_values_of_another_shape_or_dtype_are_refused(devices):
    plan = plan_of("data=8", LinenStack())
    _, variables = plan.model(plan.init(0))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    with pytest.raises(ModelError, match=r"given bfloat16\[32, 64\], model float32\[32, 64\]"):
        plan.init(variables=half)


# -- hardware that is not here ------------------------------------------------------------------


def test_a_plan_for_hardware_that_is_not_here():
    batch = {k: np.concatenate([v] * 4) for k, v in BATCH.items()}
    plan = st.plan(Stack, loss, optax.sgd(0.1), batch, "data=-1,fsdp=8", hardware="h100:8x8")
    assert isinstance(plan.mesh, AbstractMesh)
    assert (plan.mesh.size, plan.mesh.shape["data"]) == (64, 8)
    assert "fsdp" in str(plan.explain())
    assert plan.memory().params * 8 >= 2 * 4 * (32 * 64 * 2)
    for use in (plan.init, lambda: plan.step(None, BATCH), lambda: plan.eval_step(None, BATCH)):
        with pytest.raises(ShardtrainError, match=r"hardware that is not here \(64 devices\)"):
            use()


# -- refusals, before anything is compiled ------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        (st.Strategy(data=8, rules={"embd": "tensor"}), UnusedRuleError, "'embd'"),
        (
            st.Strategy(data=8, rules={"block/**": ()}),
            UnusedRuleError,
            r"'block/\*\*' matches none",
        ),
        (st.Strategy(data=8, rules={"blocks/**": "tensr"}), UnknownAxisError, "mesh axis 'tensr'"),
        (st.Strategy(data=2, dcn={"data": 2}, fsdp=4), MeshError, "devices form 1 with"),
    ],
)
def test_wrong_strategies_fail_when_planning(devices, strategy, error, message):
    with pytest.raises(error, match=message):
        plan_of(strategy)


def test_odd_sizes_are_refused_with_path_and_remedy(devices):
    model = st.Functional(init=lambda key: {"table": jnp.zeros((101, 7)), "w": jnp.zeros((8,))})
    fn = lambda v, b: st.Mean(jnp.sum(v["table"]) + jnp.sum(v["w"]), 1.0)
    with pytest.raises(ReplicationError, match=r"table \(101, 7\) float32, 2,828 bytes"):
        st.plan(model, fn, optax.sgd(0.1), BATCH, "fsdp=8")
    plan = st.plan(
        model, fn, optax.sgd(0.1), BATCH, st.Strategy(fsdp=8, allow_replicated=("table",))
    )
    assert "no dim of (101, 7) is divisible by fsdp=8" in str(plan.explain())


def test_unknown_strategy_text():
    with pytest.raises(StrategyError, match="did you mean 'data'"):
        plan_of("dta=8")


# -- explanations -------------------------------------------------------------------------------


def test_explain_lists_every_parameter_with_bytes(devices):
    plan = plan_of("data=2,fsdp=4")
    table = plan.explain()
    paths = {row[0] for row in table.rows}
    assert paths == set(leaves_by_path(plan.abstract_state.params))
    assert "2.0 KiB" in str(table)  # (32, 64) float32 over fsdp=4
    assert "<table>" in table._repr_html_()


def test_memory_after_compiling_has_the_compilers_figures(devices):
    plan = plan_of("fsdp=8")
    assert plan.memory().compiled_arguments is None
    plan.collectives()
    memory = plan.memory()
    held = memory.params + memory.optimizer + memory.variables + memory.batch
    assert held <= memory.compiled_arguments <= held + 256
    assert memory.compiled_temporaries > 0


def test_describe_is_json(devices):
    import json

    described = json.loads(json.dumps(plan_of("data=2,fsdp=4").describe()))
    assert described["model"] == "Stack"
    assert described["mesh"] == {"data": 2, "fsdp": 4}
    assert described["num_devices"] == 8
    assert st.Strategy.parse(described["strategy"]) == st.Strategy(data=2, fsdp=4)


def test_planning_changes_nothing_and_plans_are_independent(devices):
    module = Stack(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(module, nnx.Param))
    one, two = plan_of("data=8", module), plan_of("fsdp=8", module)
    a, _ = one.step(one.init(), BATCH)
    b, _ = two.step(two.init(), BATCH)
    after = jax.tree.map(np.asarray, nnx.state(module, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6)
