"""`Strategy(pipeline=...)` through `st.plan`: the same training, and the same checkpoints."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import LossContractError, StageSplitError, StrategyError
from shardtrain.pytree import leaves_by_path

WIDTH, VOCAB, LENGTH = 16, 32, 8


class Block(nnx.Module):
    def __init__(self, rngs, dropout=0.1):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(nnx.gelu(self.up(self.norm(x)))))


class Model(nnx.Module):
    """Tied embeddings, so that one parameter is used before and after the stages."""

    def __init__(self, rngs, layers=4, dropout=0.1):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs, dropout) for _ in range(layers)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


DRY = functools.partial(Model, dropout=0.0)


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["targets"], batch["mask"])


def rows(count=64):
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(0, VOCAB, (count, LENGTH)).astype("int32"),
        "targets": random.integers(0, VOCAB, (count, LENGTH)).astype("int32"),
        "mask": (random.random((count, LENGTH)) > 0.3).astype("float32"),
    }


@pytest.fixture(scope="module")
def loader():
    return st.DataLoader(rows(), 16, seed=1)


def make_plan(strategy, model=Model, optimizer=None):
    batch = {k: v[:16] for k, v in rows().items()}
    return st.plan(model, loss_fn, optimizer or optax.adam(1e-2), batch, strategy)


@pytest.fixture(scope="module")
def pipelined(devices):
    return make_plan("data=2,pipeline=2,tensor=2,num_microbatches=4")


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp=2,data=2,pipeline=2,num_microbatches=4,schedule=gpipe",
        "data=4,pipeline=2,num_microbatches=2,schedule=interleaved,virtual_stages=2",
        "data=2,pipeline=4,num_microbatches=4,max_grad_norm=0.5",
        "pipeline=2,tensor=2,fsdp=2,sequence_parallel=True,num_microbatches=2",
    ],
)
def test_a_pipeline_trains_like_one_device(strategy, devices):
    st.verify(make_plan(strategy), num_steps=1).raise_if_failed()


@pytest.mark.parametrize(
    "strategy",
    [
        "data=2,pipeline=2,tensor=2,num_microbatches=4",
        "data=2,fsdp=2,pipeline=2,zero=1,num_microbatches=2,schedule=zero-bubble",
    ],
)
def test_gradients_cross_the_batch_axes_once_per_step(strategy, devices):
    """With dropout in every block: replicas draw their part of what one device draws."""
    plan = make_plan(strategy)
    assert plan.gradients.reason == ""
    found = [c for c in plan.collectives() if {"data", "fsdp"} & set(c.axes)]
    assert not [c for c in found if c.in_loop]
    reduced = sum(c.bytes * c.count for c in found if c.kind in ("all-reduce", "reduce-scatter"))
    # Each device's own share of all gradients, and scalars.
    stage = sum(
        x.size * 4 // x.sharding.mesh.shape["pipeline"] if path.startswith("blocks") else x.size * 4
        for path, x in leaves_by_path(plan.abstract_state.params).items()
    )
    assert 0 < reduced <= stage + 256
    st.verify(plan, num_steps=1).raise_if_failed()


class Normalized(Model):
    """Statistics over the whole microbatch: no replica can compute its part alone."""

    def __init__(self, rngs):
        super().__init__(rngs, dropout=0.0)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


def test_batch_statistics_reduce_in_every_tick_and_say_so(devices):
    plan = make_plan("data=2,pipeline=2,tensor=2,num_microbatches=4", Normalized)
    assert "the model updates its variables (norm/mean, norm/var)" in plan.gradients.reason
    assert "gradients are reduced in each of 4 microbatches" in str(plan.explain())


def test_the_cube_trains_like_one_device(pipelined):
    st.verify(pipelined, num_steps=2).raise_if_failed()


def test_blocks_live_on_their_stage(pipelined):
    kernel = pipelined.layout.params["blocks/layers/*/up/kernel"]
    assert kernel.shape == (2, 1, 2, WIDTH, 2 * WIDTH)
    assert kernel.full[0] == "pipeline"
    assert "4 layers over 2 stages" in kernel.why
    assert pipelined.schedule.name == "1f1b"
    assert pipelined.schedule.num_microbatches == 4
    sent = [c for c in pipelined.collectives() if c.kind == "collective-permute"]
    assert any(c.axes == ("pipeline",) for c in sent)


def test_explain_says_who_holds_what_and_what_is_sent(devices):
    plan = make_plan("data=2,pipeline=2,tensor=2,num_microbatches=4", DRY)
    text = " ".join(str(plan.explain()).split())
    assert "1f1b: 4 layers over 2 stages, 4 microbatches, a bubble of 20.0%" in text
    assert "stage 0: layers 0-1; stage 1: layers 2-3" in text
    carry = 2 * LENGTH * WIDTH * 4  # 16 rows over 2 replicas and 4 microbatches
    assert "each device sends 1.0 KiB to the next stage in 5 ticks and as much back in 5" in text
    sent = [c for c in plan.collectives() if c.kind == "collective-permute"]
    forward = [c for c in sent if "pipeline/tick.py:" in c.source]
    assert {c.bytes for c in forward} == {carry}
    assert sum(c.count for c in forward) == 5


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_the_program_does_not_grow_with_layers_or_microbatches(schedule, devices):
    """Nor, then, does compile time: as many lines of StableHLO for more of either."""

    def lines(layers, microbatches):
        model = functools.partial(Model, layers=layers, dropout=0.0)
        strategy = f"data=4,pipeline=2,num_microbatches={microbatches},schedule={schedule}"
        return make_plan(strategy, model)._lower_step().as_text().count("\n")

    few = lines(4, 2)
    assert few > 500
    assert lines(12, 2) < 1.02 * few
    assert lines(4, 4) < 1.02 * few


def test_checkpoints_move_between_any_number_of_stages(pipelined, loader, tmp_path):
    """Pipeline 2 -> none -> 4: every restored number is the one that was saved."""
    first = st.fit(pipelined, loader, 2, tmp_path, progress=False)
    saved = pipelined.to_checkpoint(first.state)
    flat = make_plan("data=8")
    with st.Checkpointer(tmp_path, flat) as checkpoints:
        restored = checkpoints.restore()
    same = lambda a, b: jax.tree.map(
        np.testing.assert_array_equal, (a.params, a.opt_state), (b.params, b.opt_state)
    )
    same(saved, restored)
    deep = make_plan("data=2,pipeline=4,num_microbatches=2")
    with st.Checkpointer(tmp_path, deep) as checkpoints:
        again = checkpoints.restore()
    same(saved, deep.to_checkpoint(again))
    assert "params/layers/3/up/kernel" in leaves_by_path(st.restore(tmp_path))
    continued = st.fit(flat, loader, 3, tmp_path, progress=False)
    assert [h["step"] for h in continued.history] == [3]


def test_optimizers_of_whole_arrays_keep_their_state_per_layer(devices):
    """LAMB compares norms of whole arrays: it sees every layer apart, in checkpoints too."""
    plan = make_plan("data=4,pipeline=2,num_microbatches=2", optimizer=optax.lamb(1e-2))
    st.verify(plan, num_steps=1).raise_if_failed()
    state, _ = plan.step(plan.init(0), {k: v[:16] for k, v in rows().items()})
    saved = plan.to_checkpoint(state)
    moments = [p for p in leaves_by_path(saved.opt_state) if p.endswith("mu/layers/3/up/kernel")]
    assert len(moments) == 1
    again = plan.to_checkpoint(plan.from_checkpoint(saved))
    jax.tree.map(np.testing.assert_array_equal, saved.opt_state, again.opt_state)


def test_the_model_comes_back_whole(pipelined):
    state = pipelined.init(0)
    model = pipelined.model(state)
    reference = Model(nnx.Rngs(0))
    found, expected = model.layers[3].up.kernel, reference.layers[3].up.kernel
    np.testing.assert_array_equal(found[...], expected[...])
    given = pipelined.init(variables=reference)
    jax.tree.map(np.testing.assert_array_equal, given.params, state.params)


def test_layers_that_do_not_divide_are_refused(devices):
    with pytest.raises(StageSplitError, match="3 blocks"):
        make_plan("data=2,pipeline=4,num_microbatches=2", lambda rngs: Model(rngs, layers=3))


def test_a_model_without_blocks_is_refused(devices):
    class Flat(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(self.embed(tokens))

    with pytest.raises(StageSplitError, match="Looked for sibling modules that repeat"):
        make_plan("data=4,pipeline=2", Flat)


def test_a_mean_of_means_is_refused(devices):
    mean = lambda model, batch: loss_fn(model, batch).value
    batch = {k: v[:16] for k, v in rows().items()}
    with pytest.raises(LossContractError, match="4 microbatches"):
        st.plan(Model, mean, optax.sgd(0.1), batch, "data=4,pipeline=2,num_microbatches=4")


def test_virtual_stages_need_a_pipeline(devices):
    with pytest.raises(StrategyError, match="virtual_stages"):
        make_plan("data=8,virtual_stages=2")


def test_a_loss_may_ask_whether_it_trains(devices):
    """A keyword `train` reaches the loss also through the stages."""
    asked = []

    def asking(model, batch, train):
        asked.append(train)
        return loss_fn(model, batch)

    plan = st.plan(DRY, asking, optax.sgd(0.1), rows(8), "data=4,pipeline=2,num_microbatches=2")
    assert asked
    assert all(asked)
    assert plan.pipelined is not None
