"""Forms that published Flax code has, found by running it: each once broke something."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from zoo import ZOO

import shardtrain as st

IDS = jax.ShapeDtypeStruct((16, 8), jnp.int32)
MASK = jax.ShapeDtypeStruct((16, 8), jnp.float32)


class Annotated(nn.Module):
    """Attention as in Flax's language model example: `kv` names the dim of the heads."""

    @nn.compact
    def __call__(self, ids):
        named = lambda *names: nn.with_logical_partitioning(nn.initializers.normal(), names)
        x = nn.Embed(32, 16, embedding_init=named("vocab", "embed"))(ids)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=4, kernel_init=named("embed", "kv"), use_bias=False
        )(x)
        return nn.Dense(32, kernel_init=named("embed", "vocab"))(x)


def loss(model, batch):
    return st.cross_entropy(model(batch["ids"]), batch["ids"], batch["a_mask"])


def plan_of(strategy):
    batch = {"ids": IDS, "a_mask": MASK}
    return st.plan(Annotated(), loss, optax.sgd(0.1), batch, strategy)


def test_a_name_that_means_two_things_is_left_to_inference():
    layout = plan_of("data=4,tensor=2").layout.params
    query = layout["MultiHeadDotProductAttention_0/query/kernel"]
    assert (query.compute, query.rule) == (P(None, "tensor"), "inferred")
    assert "('embed', 'kv', None) leads to no mesh axis" in query.why
    assert layout["MultiHeadDotProductAttention_0/out/kernel"].compute == P("tensor")


def test_a_rule_for_that_name_still_decides():
    strategy = st.Strategy(data=4, tensor=2, rules={"kv": None})
    layout = plan_of(strategy).layout.params
    assert layout["MultiHeadDotProductAttention_0/query/kernel"].compute == P()


def test_a_float_mask_does_not_hide_the_sequence():
    specs = {k: v.sharding.spec for k, v in plan_of("data=2,context=4").layout.batch.items()}
    assert specs == {"ids": P("data", "context"), "a_mask": P("data", "context")}


def test_convolutions_are_split_rather_than_refused():
    case = ZOO["resnet"]
    make = lambda s: st.plan(case.make(), case.loss, optax.sgd(0.1), case.batch(16, 0), s)
    layout = make("data=4,tensor=2").layout.params
    assert layout["ResidualBlock_0/Conv_0/kernel"].compute == P(None, None, None, "tensor")
    assert layout["ResidualBlock_0/Conv_1/kernel"].compute == P(None, None, "tensor")
    assert make("data=8").layout.params["ResidualBlock_0/Conv_0/kernel"].compute == P()


def test_models_written_otherwise_for_one_row_are_accepted():
    """A loss whose program has other operations for few rows is reduced in each microbatch."""

    def odd(v, batch, rngs):
        x = batch["x"]
        drop = lambda x: x * jax.random.bernoulli(rngs.dropout(), 0.5, x.shape)
        y = drop(jnp.tanh(x @ v["w"])) if x.shape[0] > 1 else jnp.tanh(x @ v["w"])
        return st.Mean(jnp.sum(y**2), x.shape[0])

    batch = {"x": np.ones((16, 4), np.float32)}
    model = st.Functional(init=lambda key: {"w": jnp.ones((4, 4))})
    plan = st.plan(model, odd, optax.sgd(0.1), batch, "data=8,num_microbatches=2")
    assert "gradients are reduced in each of 2 microbatches" in plan.findings[0]
