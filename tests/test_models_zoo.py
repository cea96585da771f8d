"""The rest of the zoo: routing by hand, and first steps on a mesh that equal one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import ModelError
from shardtrain.models import CNN, MoEConfig, MoEDecoder, ViT, ViTConfig
from shardtrain.models.moe import MoE, route
from shardtrain.models.vit import patches

MOE = MoEConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16,
    num_experts=4,
)  # fmt: skip
VIT = ViTConfig(
    image_size=8, channels=1, num_classes=3, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32
)


def moe_loss(model, batch):
    logits, stats = model(batch["tokens"])
    loss = st.cross_entropy(logits, batch["targets"])
    rows = stats["balance"].shape[0]
    balance = st.Mean(jnp.sum(stats["balance"]), rows)
    total = loss.total + 0.01 * balance.total * loss.weight / balance.weight
    dropped = st.Mean(jnp.sum(stats["dropped"]), rows)
    return st.Mean(total, loss.weight), {"balance": balance, "dropped": dropped}


def image_loss(model, batch):
    return st.cross_entropy(model(batch["image"]), batch["label"])


def tokens_batch():
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def image_batch():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(8, 8, 8, 1)).astype("float32")
    return {"image": image, "label": rng.integers(0, 3, 8)}


def one_step(model, loss, batch, strategy, devices=None):
    plan = st.plan(model, loss, optax.sgd(0.1), batch, strategy, devices=devices)
    state, metrics = plan.step(plan.init(seed=1), batch)
    return plan, jax.tree.map(np.asarray, state.params), jax.tree.map(float, metrics)


def compare(model, loss, batch, strategy):
    plan, params, metrics = one_step(model, loss, batch, strategy)
    _, expected, single = one_step(model, loss, batch, None, jax.devices()[:1])
    for name, value in single.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), params, expected
    )
    return plan


def test_experts_are_split_over_their_axis_and_match_one_device():
    model = lambda rngs: MoEDecoder(MOE, rngs=rngs)
    plan = compare(model, moe_loss, tokens_batch(), "data=2,expert=2,tensor=2")
    layout = plan.layout.params
    assert tuple(layout["blocks/0/moe/gate"].full) == ("expert", None, "tensor")
    assert tuple(layout["blocks/0/moe/down"].full) == ("expert", "tensor")


def test_experts_inside_the_stages_of_a_pipeline_match_one_device():
    model = lambda rngs: MoEDecoder(MOE, rngs=rngs)
    strategy = st.Strategy(data=2, expert=2, pipeline=2, num_microbatches=2, allow_replicated="**")
    plan = st.plan(model, moe_loss, optax.sgd(0.1), tokens_batch(), strategy)
    assert any(c.kind == "all-to-all" and c.axes == ("expert",) for c in plan.collectives())
    st.verify(plan, num_steps=1).raise_if_failed()


def test_vit_on_a_mesh_matches_one_device():
    compare(lambda rngs: ViT(VIT, rngs=rngs), image_loss, image_batch(), "data=2,fsdp=2,tensor=2")


def test_cnn_takes_a_step_and_keeps_batch_statistics():
    model = CNN(num_classes=3, features=(4,), hidden=8)
    loss = lambda m, batch, train: st.cross_entropy(m(batch["image"], train), batch["label"])
    plan = st.plan(model, loss, optax.sgd(0.1), image_batch(), "data=8")
    before = plan.init(seed=0)
    mean = np.asarray(before.variables["batch_stats"]["BatchNorm_0"]["mean"])
    state, _ = plan.step(before, image_batch())
    assert not np.allclose(state.variables["batch_stats"]["BatchNorm_0"]["mean"], mean)


def test_routing_by_hand():
    logits = jnp.array([[[4.0, 1, 0], [0, 1, 4]]])
    routing = route(logits, experts_per_token=2)
    assert routing.chosen.tolist() == [[[0, 1], [2, 1]]]
    weight = float(jax.nn.softmax(jnp.array([4.0, 1.0]))[0])
    np.testing.assert_allclose(routing.weights[0], [[weight, 1 - weight]] * 2, rtol=1e-5)


def test_balance_is_one_when_even_and_the_number_of_experts_when_all_go_to_one():
    even = 20 * jnp.eye(4)[None]
    assert float(route(even, 1).balance[0]) == pytest.approx(1.0, abs=1e-3)
    single = jnp.tile(20 * jnp.eye(4)[:1], (4, 1))[None]
    assert float(route(single, 1).balance[0]) == pytest.approx(4.0, abs=1e-3)


def test_experts_exchange_tokens_by_all_to_all_and_nothing_else_over_their_axis(devices):
    """Per layer two there and two back; the gradients of what all devices hold are summed."""
    model = lambda rngs: MoEDecoder(MOE, rngs=rngs)
    strategy = st.Strategy(data=2, expert=4, allow_replicated="**")
    plan = st.plan(model, moe_loss, optax.sgd(0.1), tokens_batch(), strategy)
    places = 1 * MOE.num_experts * MOE.capacity(8) * MOE.embed_dim * 4
    found = [c for c in plan.collectives() if c.kind == "all-to-all"]
    assert {c.axes for c in found} == {("expert",)}
    assert sum(c.bytes * c.count for c in found) == 4 * MOE.num_layers * places
    assert {c.kind for c in plan.collectives()} == {"all-to-all", "all-reduce"}


def test_experts_with_room_for_all_equal_the_mixture_written_out():
    config = MoEConfig(embed_dim=8, mlp_dim=8, num_experts=2, capacity_factor=4.0)
    moe = MoE(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    out, stats = moe(x)
    probs = jax.nn.softmax(moe.router(x), axis=-1)
    expert = lambda e: (jax.nn.silu(x @ moe.gate[e]) * (x @ moe.up[e])) @ moe.down[e]
    expected = sum(probs[..., e : e + 1] * expert(e) for e in range(2))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)
    assert float(stats["dropped"][0]) == 0.0


def test_patches_are_those_of_the_image():
    image = jnp.arange(16).reshape(1, 4, 4, 1)
    assert patches(image, 2)[0].tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MoEConfig(experts_per_token=9), "experts_per_token=9"),
        (lambda: ViTConfig(patch_size=5), "patch_size=5 does not divide image_size=32"),
        (lambda: ViTConfig(num_heads=5), "num_heads=5 does not divide embed_dim=192"),
    ],
)
def test_config_that_cannot_work(make, said):
    with pytest.raises(ModelError, match=said):
        make()
