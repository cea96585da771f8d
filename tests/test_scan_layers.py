"""`Strategy(scan_layers=...)`: the same training, with less to compile and to gather."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pipeline_models as models
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import StageSplitError, StrategyError
from shardtrain.plan.layer_scan import FEWEST_LAYERS
from shardtrain.pytree import leaves_by_path, tree_bytes

MADE = {
    "linen layers, dropout": models.LinenModel(mode="loop"),
    "linen layers in remat": models.LinenModel(mode="remat"),
    "linen layers that alternate": models.LinenModel(mode="alternating"),
    "linen scan": models.LinenModel(mode="scan"),
    "nnx layers, dropout": lambda rngs: models.NnxModel(rngs, mode="plain"),
    "nnx batch statistics": lambda rngs: models.NnxModel(rngs, mode="norm"),
    "nnx auxiliary losses": lambda rngs: models.NnxModel(rngs, mode="aux"),
    "nnx scan": lambda rngs: models.NnxModel(rngs, mode="scan"),
}


def make_plan(model, strategy, **fields):
    s = st.Strategy.parse(strategy).replace(allow_replicated="**", **fields)
    return st.plan(model, models.loss, optax.adam(1e-2), models.make_batch(16), s)


STRATEGIES = ("data=2,fsdp=2,tensor=2", "data=2,fsdp=4,num_microbatches=2")


@pytest.mark.parametrize(("name", "strategy"), [*zip(MADE, 4 * STRATEGIES, strict=True)])
def test_same_numbers_as_one_device_without_the_loop(devices, name, strategy):
    plan = make_plan(MADE[name], strategy, scan_layers=True)
    assert plan.layer_scan is not None
    assert (plan.pipelined is None) == ("scan" in name)  # such a model keeps its own arrays
    st.verify(plan, num_steps=1, find_suspect=False).raise_if_failed()


@pytest.mark.parametrize(
    "strategy",
    [
        "data=8,sync=LocalSGD(2)",
        "data=2,tensor=2,fsdp=2,precision=bf16",
        "fsdp=8,zero=1,remat=full",
        "data=2,fsdp=2,tensor=2,sequence_parallel=True",
    ],
)
def test_other_strategies_train_as_without_the_loop(devices, strategy):
    model = lambda rngs: models.NnxModel(rngs, mode="dry")
    batch = models.make_batch(16)
    final = []
    for scan in (True, False):
        plan = make_plan(model, strategy, scan_layers=scan)
        state = plan.init()
        for _ in range(3):
            state, metrics = plan.step(state, batch)
        final.append((float(metrics["loss"]), plan.to_checkpoint(state).params))
    (loss, params), (wanted_loss, wanted) = final
    rough = 2e-2 if "bf16" in strategy else 1e-5
    assert loss == pytest.approx(wanted_loss, rel=rough)
    for path, x in leaves_by_path(wanted).items():
        found = leaves_by_path(params)[path]
        np.testing.assert_allclose(found, x, rtol=rough, atol=3 * rough, err_msg=path)


class Block(nnx.Module):
    def __init__(self, rngs, width):
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Deep(nnx.Module):
    def __init__(self, rngs, layers=8, width=32):
        self.layers = nnx.List([Block(rngs, width) for _ in range(layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def deep(strategy, layers=8, width=32):
    batch = {"x": jax.ShapeDtypeStruct((8, width), jnp.float32)}
    loss = lambda model, batch: st.Mean(jnp.sum(model(batch["x"]) ** 2), batch["x"].size)
    make = functools.partial(Deep, layers=layers, width=width)
    return st.plan(make, loss, optax.sgd(1e-2), batch, strategy)


def operations(plan):
    return len(re.findall(r" = ", plan.compile().hlo))


def test_the_program_does_not_grow_with_the_layers(devices):
    """From 8 layers on by itself; the unscanned program is there for comparison."""
    eight, sixteen = operations(deep("data=4,fsdp=2")), operations(deep("data=4,fsdp=2", 16))
    assert abs(sixteen - eight) <= 2
    apart = [operations(deep("data=4,fsdp=2,scan_layers=false", n)) for n in (8, 16)]
    assert apart[1] > 1.7 * apart[0] > 3 * eight


def test_parameters_are_gathered_one_layer_at_a_time(devices):
    layers, width = 16, 64
    plan = deep("fsdp=8", layers, width)
    compiled = plan.compile()
    each = 4 * width * width * 4
    gathers = [c for c in compiled.collectives if c.kind == "all-gather"]
    assert [(c.bytes, c.in_loop, c.count) for c in gathers] == [(each, True, 2 * layers)] * 2
    whole = tree_bytes(plan.abstract_state.params)
    assert whole == 2 * layers * each
    assert compiled.temp_bytes < whole / 2  # its shards of the gradients, and two layers
    assert deep("fsdp=8,scan_layers=false", layers, width).compile().temp_bytes > whole


def test_remat_holds_beside_the_gathers(devices):
    """The gathers are rematerialised by a policy of their own, which must not undo the model's."""
    plain, full = (deep(f"fsdp=8,remat={r}", 8, 64).compile() for r in ("none", "full"))
    product = 2 * 64 * 256  # of one layer and the device's one row
    assert full.flops - plain.flops == 8 * product  # the second one's result is not needed again


def test_a_model_that_scans_gathers_in_its_own_loop(devices):
    plan = make_plan(models.LinenModel(mode="scan", layers=6), "fsdp=8")
    assert plan.findings == ("6 scanned layers: compiled once, as a loop over 6",)
    own = leaves_by_path(make_plan(MADE["linen scan"], "data=8").abstract_state.params)
    assert set(leaves_by_path(plan.abstract_state.params)) == set(own)
    counts = {c.count for c in plan.collectives() if c.kind == "all-gather" and c.in_loop}
    assert counts == {6, 12}  # both passes; equal ones are one row


def test_only_deep_models_and_only_on_request():
    few = deep("data=8", FEWEST_LAYERS - 1)
    assert few.layer_scan is None
    assert not few.findings
    assert deep("data=8,scan_layers=true", 2).layer_scan is not None
    assert deep("data=8,scan_layers=false", 12).layer_scan is None
    assert deep("data=8", FEWEST_LAYERS).findings == (
        "8 blocks at layers/*: compiled once, as a loop over 8",
    )


def test_checkpoints_are_of_the_models_own_layers(devices, tmp_path):
    scanned, apart = deep("fsdp=4,data=2"), deep("data=8,scan_layers=false")
    batch = {"x": np.linspace(-1, 1, 8 * 32, dtype=np.float32).reshape(8, 32)}
    state, _ = scanned.step(scanned.init(), batch)
    with st.Checkpointer(tmp_path, scanned) as checkpointer:
        checkpointer.save(state)
    with st.Checkpointer(tmp_path, apart) as checkpointer:
        restored = checkpointer.restore()
    again = scanned.to_checkpoint(state)
    for path, x in leaves_by_path(restored.params).items():
        np.testing.assert_array_equal(x, leaves_by_path(again.params)[path])
    model = scanned.model(state)
    np.testing.assert_array_equal(
        model.layers[3].up.kernel[...], restored.params["layers"][3]["up"]["kernel"]
    )


def test_what_cannot_be_scanned_is_refused_or_said():
    class Unlike(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List(
                [nnx.Linear(8 + n, 9 + n, use_bias=False, rngs=rngs) for n in range(9)]
            )

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    batch = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    loss = lambda model, batch: st.Mean(jnp.sum(model(batch["x"]) ** 2), batch["x"].size)
    make = lambda s: st.plan(lambda rngs: Unlike(rngs), loss, optax.sgd(0.1), batch, s)
    (said,) = make("data=8").findings
    assert said.startswith("layers are compiled one by one, not as a loop: ")
    assert said.endswith("layers are too unlike each other: a loop would turn 1 times")
    with pytest.raises(StageSplitError, match="a loop would turn 1 times"):
        make("data=8,scan_layers=true")
    with pytest.raises(StrategyError, match="scan_layers=3 is not True, False or None"):
        st.Strategy(scan_layers=3)
    assert st.Strategy.parse("scan_layers=none") == st.Strategy()


def test_a_loop_keeps_products_and_no_elementwise_results(devices):
    """Per layer: the input, and what the two matmuls give; the compiler's memory follows."""
    rows, width, layers = 512, 16, 8
    batch = {"x": jax.ShapeDtypeStruct((rows, width), jnp.float32)}
    loss = lambda model, batch: st.Mean(jnp.sum(model(batch["x"]) ** 2), batch["x"].size)
    make = functools.partial(Deep, layers=layers, width=width)
    plan_of = lambda s: st.plan(make, loss, optax.sgd(1e-2), batch, s, devices=devices[:1])
    loop, apart = plan_of("data=1"), plan_of("data=1,scan_layers=false")
    wide, narrow = 4 * rows * 4 * width, 4 * rows * width  # bytes of what `up` gives, and the rest
    kept = loop.activation_bytes()
    assert kept <= layers * (wide + 2 * narrow) + 2 * narrow
    assert kept < 0.5 * apart.activation_bytes()
    temp = loop.compile().temp_bytes
    assert kept <= temp <= kept + 3 * wide + 3 * 8 * width * width * layers * 4
