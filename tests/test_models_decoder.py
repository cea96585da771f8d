"""The zoo: shapes, causality, gradients on a mesh equal one device, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import ModelError
from shardtrain.models import Decoder, DecoderConfig
from shardtrain.models.generate import append, choose, generate
from shardtrain.models.layers import Attention, RMSNorm, attend, rotary

TINY = DecoderConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32
)


def next_token_loss(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["targets"], batch["mask"])


def make_batch(rows=8, length=8):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, size=(rows, length + 1)).astype(np.int32)
    mask = (rng.random((rows, length)) < 0.8).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def tiny_plan(strategy, optimizer=None):
    factory = lambda rngs: Decoder(TINY, rngs=rngs)
    return st.plan(factory, next_token_loss, optimizer or optax.sgd(0.1), make_batch(), strategy)


def test_default_config_is_a_few_million_parameters():
    model = nnx.eval_shape(lambda: Decoder(DecoderConfig(), rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == 2_885_888


def test_decoder_is_plain_flax_and_causal():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    logits = model(tokens)
    changed = model(tokens.at[:, 4].set(31))
    assert logits.shape == (2, 6, 32)
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    assert not np.allclose(logits[:, 4], changed[:, 4])


def test_attention_that_is_not_causal_sees_everything():
    layer = Attention(8, 2, 1, 4, causal=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    assert not np.allclose(layer(x)[:, 0], layer(x.at[:, 4].set(0.0))[:, 0])


def test_rms_norm_of_known_values():
    norm = RMSNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.array([[3.0, 4.0]])), [[0.8485281, 1.1313708]], rtol=1e-6)


def test_rotary_keeps_lengths_and_depends_on_distance_only():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    np.testing.assert_allclose(
        jnp.linalg.norm(rotary(x), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    same = jnp.broadcast_to(x[:, :1], x.shape)
    turned = rotary(same)[0, :, 0]
    np.testing.assert_allclose(turned[1] @ turned[3], turned[2] @ turned[4], rtol=1e-4)


def test_grouped_heads_share_keys_and_values():
    key = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(key[0], (1, 4, 1, 2, 3))
    k, v = (jax.random.normal(kk, (1, 4, 1, 3)) for kk in key[1:])
    grouped = attend(query, k, v, causal=True)
    repeated = attend(
        query.reshape(1, 4, 2, 1, 3), *(jnp.repeat(t, 2, axis=2) for t in (k, v)), True
    )
    np.testing.assert_allclose(grouped.reshape(1, 4, 2, 1, 3), repeated, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_kv_heads": 3}, "num_kv_heads=3"), ({"head_dim": 5}, "head_dim=5 is odd")],
)
def test_config_that_cannot_work(changes, said):
    with pytest.raises(ModelError, match=said):
        DecoderConfig(**{"num_heads": 4, **changes})


def test_every_parameter_is_split_by_its_annotation():
    layout = tiny_plan("data=2,fsdp=2,tensor=2").layout
    specs = {path: tuple(leaf.full) for path, leaf in layout.params.items()}
    assert specs["blocks/0/attention/query/kernel"] == ("fsdp", "tensor")
    assert specs["blocks/0/attention/out/kernel"] == ("tensor", None, "fsdp")
    assert specs["blocks/1/mlp/gate/kernel"] == ("fsdp", "tensor")
    assert specs["blocks/1/mlp/down/kernel"] == ("tensor", "fsdp")
    assert specs["unembedding/kernel"] == ("fsdp", "tensor")
    assert specs["embedding/embedding"] == ("fsdp",)


@pytest.mark.parametrize(
    "strategy", ["data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2,num_microbatches=2"]
)
def test_gradients_on_a_mesh_equal_one_device(strategy):
    batch = make_batch()
    sharded = tiny_plan(strategy)
    state, metrics = sharded.step(sharded.init(seed=3), batch)

    def loss(params, others):
        return next_token_loss(nnx.merge(graph, params, others), batch).value

    graph, params, others = nnx.split(
        Decoder(TINY, rngs=nnx.Rngs(jax.random.key(3))), nnx.Param, ...
    )
    value, grads = jax.value_and_grad(loss)(params, others)
    np.testing.assert_allclose(metrics["loss"], value, rtol=3e-6)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        nnx.to_pure_dict(expected),
        jax.tree.map(np.asarray, state.params),
    )


def test_tokens_append_and_the_window_moves():
    tokens, length = append(jnp.array([1, 2, 0]), jnp.int32(2), jnp.int32(9))
    assert (tokens.tolist(), int(length)) == ([1, 2, 9], 3)
    tokens, length = append(tokens, length, jnp.int32(7))
    assert (tokens.tolist(), int(length)) == ([2, 9, 7], 3)


def test_temperature_zero_is_the_most_likely_token():
    logits = jnp.array([0.0, 3.0, 2.9])
    for seed in range(5):
        assert int(choose(logits, jax.random.key(seed), jnp.float32(0.0))) == 1
    drawn = {int(choose(logits, jax.random.key(s), jnp.float32(1.0))) for s in range(40)}
    assert drawn >= {1, 2}


def test_generate_matches_the_model_run_by_hand():
    plan = tiny_plan("data=2,fsdp=2,tensor=2")
    state = plan.init(seed=0)
    prompt = np.array([5, 6, 7])
    sampled = generate(plan, state, prompt, 3, window=8, temperature=0.0)
    model, tokens = plan.model(state), prompt.tolist()
    for _ in range(3):
        tokens.append(int(jnp.argmax(model(jnp.array([tokens]))[0, -1])))
    assert sampled.tolist() == tokens[3:]


def test_generate_compiles_once_per_length_and_depends_on_the_seed():
    plan = tiny_plan("data=8")
    state = plan.init(seed=0)
    draw = lambda seed: generate(plan, state, np.array([1]), 12, window=8, seed=seed).tolist()
    first = draw(0)
    assert (len(first), first == draw(0), first != draw(1)) == (12, True, True)
    assert plan.trace_counts["call"] == 1


@pytest.mark.parametrize(
    ("prompt", "count", "temperature", "said"),
    [([], 3, 1.0, "prompt"), ([1], 0, 1.0, "num_tokens=0"), ([1], 1, -1.0, "temperature=-1.0")],
)
def test_generate_refuses(prompt, count, temperature, said):
    plan = tiny_plan("data=8")
    with pytest.raises(ModelError, match=said):
        generate(plan, None, np.array(prompt, int), count, window=4, temperature=temperature)
