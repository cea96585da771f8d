"""What our decoder communicates under each strategy is what the formula says, byte for byte.

Rajbhandari et al. 2020 (data, ZeRO), Shoeybi et al. 2019 (tensor), Liu et al. 2023 (context). The
CPU compiler writes a reduce-scatter as an all-reduce; sequence parallelism and experts have their
own tests, in test_sequence_parallel.py and test_models_zoo.py.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.models import Decoder, DecoderConfig
from shardtrain.pytree import leaves_by_path

CONFIG = DecoderConfig(
    vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
ROWS, LENGTH = 16, 16
SCALARS = 256
"""Loss, weight, norms and flags: a few numbers of 4 bytes each."""


def loss(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["targets"])


def nats(model, batch):
    return model.nats(batch["tokens"], batch["targets"], num_chunks=4)


def plan_of(strategy, loss=loss, **changes):
    config = DecoderConfig(**{**vars(CONFIG), **changes})
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 64, (ROWS, LENGTH)).astype("int32") for k in ("tokens", "targets")}
    return st.plan(lambda rngs: Decoder(config, rngs=rngs), loss, optax.sgd(0.1), batch, strategy)


def totals(plan):
    """(kind, axes) -> bytes, scalars left out."""
    found = {}
    for c in plan.collectives():
        found[c.kind, c.axes] = found.get((c.kind, c.axes), 0) + c.bytes * c.count
    return {key: size for key, size in found.items() if size > SCALARS}


def is_exactly(found, wanted):
    assert found.keys() == wanted.keys()
    for key, size in wanted.items():
        assert 0 <= found[key] - size < SCALARS, (key, found[key], size)


@pytest.fixture(scope="module")
def parameters(devices):
    plan = plan_of("data=8")
    return 4 * sum(x.size for x in leaves_by_path(plan.abstract_state.params).values())


def test_data_parallelism_reduces_every_gradient_once(parameters):
    is_exactly(totals(plan_of("data=8")), {("all-reduce", ("data",)): parameters})


@pytest.mark.parametrize("zero", [1, 2])
def test_zero_1_and_2_gather_what_was_updated(parameters, zero):
    is_exactly(
        totals(plan_of(f"fsdp=8,zero={zero}")),
        {("all-reduce", ("fsdp",)): parameters, ("all-gather", ("fsdp",)): parameters},
    )


def test_zero_3_gathers_parameters_at_use(parameters):
    """Once: the compiler keeps what the forward pass gathered (nothing is rematerialised here)."""
    sums = ("all-reduce", ("fsdp",))
    gathers = ("all-gather", ("fsdp",))
    is_exactly(totals(plan_of("fsdp=8")), {sums: parameters, gathers: parameters})


def test_tensor_parallelism_reduces_four_activations_per_layer():
    """And one more for the logits' gradient. The gradients of query, key and value, and of gate and
    up, which other compilers add first, the CPU's reduces apart: 3 + 2 instead of 1 + 1."""
    stream = ROWS * LENGTH * CONFIG.embed_dim * 4
    per_position = ROWS * LENGTH * 4
    softmax = 2 * per_position  # the largest logit, and the sum with the target's
    found = totals(plan_of("tensor=8", num_heads=8, num_kv_heads=8))
    assert found.keys() == {("all-reduce", ("tensor",))}
    (size,) = found.values()
    wanted = (2 + 3 + 2) * CONFIG.num_layers * stream + stream
    assert 0 <= size - wanted <= 4 * softmax, (size, wanted)


def test_context_parallelism_turns_keys_and_values():
    """Per layer: rings of keys and values, and zigzag exchanges; gradients once over all axes."""
    plan = plan_of("data=2,context=4", attention="ring")
    found = totals(plan)
    assert {k for k, _ in found} == {"all-reduce", "collective-permute"}
    n, rows, length = 4, ROWS // 2, LENGTH // 4
    query = rows * length * CONFIG.num_heads * CONFIG.head_dim * 4
    key = query // 2
    row = query // CONFIG.head_dim
    rings = ((n - 1) * (2 + 2) + 2) * key
    zigzag = 4 * query + 4 * key + row  # gradients of keys and values come home by the ring
    per_layer = rings + zigzag
    is_exactly(
        {k: v for k, v in found.items() if k[0] == "collective-permute"},
        {("collective-permute", ("context",)): CONFIG.num_layers * per_layer},
    )


def test_ring_attention_and_chunked_loss_train_like_one_device(devices):
    plan = plan_of("data=2,context=2,tensor=2", loss=nats, attention="ring")
    st.verify(plan, num_steps=1).raise_if_failed()
    kinds = {c.kind for c in plan.collectives()}
    assert "all-to-all" not in kinds


def test_the_chunked_loss_is_the_loss(devices):
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    batch = {"tokens": tokens, "targets": tokens}
    whole, parts = loss(model, batch), nats(model, batch)
    np.testing.assert_allclose(float(parts.value), float(whole.value), rtol=1e-6)
