"""`sequence_parallel=True` on unmodified models: where constraints go, and what is then sent."""

import jax
import jax.numpy as jnp
import optax
import pytest
from zoo import ZOO
from zoo.decoders import Llama

import shardtrain as st
from shardtrain.models import Decoder, DecoderConfig
from shardtrain.planner.compiled import Compiled

CONFIG = DecoderConfig(
    vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
ROWS, LENGTH = 16, 16
ACTIVATION = ROWS * LENGTH * CONFIG.embed_dim * 4
"""Bytes of the whole batch's residual stream in float32."""


def loss(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["targets"])


def plan_of(strategy, length=LENGTH):
    ids = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    batch = {"tokens": ids, "targets": ids}
    make = lambda rngs: Decoder(CONFIG, rngs=rngs)
    return st.plan(make, loss, optax.sgd(0.1), batch, strategy)


def sent(compiled: Compiled, kind: str, axis: str, size: int) -> int:
    """How many arrays of `size` bytes are moved: combined collectives carry several."""
    found = [c for c in compiled.collectives if c.kind == kind and c.axes == (axis,)]
    return sum(c.count * (c.bytes // size) for c in found)


@pytest.fixture(scope="module")
def split(devices):
    return plan_of("data=4,tensor=2,sequence_parallel=True")


def test_gathers_where_megatron_gathers(split):
    """Per layer two gathers forward and two backward; one before the logits, one for embeddings.

    The CPU's partitioner writes each reduce-scatter as an all-reduce and a slice; the H100 program
    in test_hlo_golden has them as they are. It also sums the gradients of parallel projections
    (query, key, value; gate and up) apart.
    """
    compiled, size = split.compile(), ACTIVATION // 4
    layers = CONFIG.num_layers
    assert sent(compiled, "all-gather", "tensor", size) == (2 + 2) * layers + 1 + 1
    assert sent(compiled, "all-reduce", "tensor", size) == (2 + 3 + 2) * layers + 1
    assert {c.kind for c in compiled.collectives} == {"all-gather", "all-reduce"}
    assert split.findings == ()


def test_the_stream_is_kept_in_parts(split):
    """Norms and residuals of the backward pass are kept for a part of the sequence only."""
    whole = plan_of("data=4,tensor=2").compile()
    assert split.compile().temp_bytes < whole.temp_bytes
    lines = {c.source.partition(":")[0].rpartition("/")[2] for c in split.compile().collectives}
    assert "edit.py" not in lines  # a constraint counts as the line that it stands at


def test_a_sequence_that_does_not_divide_is_a_finding(devices):
    plan = plan_of("data=4,tensor=2,sequence_parallel=True", length=15)
    assert len(plan.findings) == 1
    assert "tensor=2 does not divide the sequence of (16, 15, 32) (" in plan.findings[0]


def test_nothing_to_split_is_a_finding(devices):
    case = ZOO["mlp-linen"]
    make = lambda s: st.plan(case.make(), case.loss, optax.sgd(0.1), case.batch(16, 0), s)
    (found,) = make("data=4,tensor=2,sequence_parallel=True").findings[-1:]
    assert found.startswith("sequence_parallel has nothing to do: no sum over tensor")
    assert "tensor=1" in make("data=8,sequence_parallel=True").findings[0]


def test_gradients_of_looked_up_rows_stay_where_they_are(devices):
    """Left to the partitioner, fsdp and tensor together exchange rows all to all."""
    for strategy in ("fsdp=4,tensor=2", "fsdp=2,data=2,tensor=2,zero=2"):
        kinds = {c.kind for c in plan_of(strategy).collectives()}
        assert kinds == {"all-gather", "all-reduce"}, strategy
    ids = jax.ShapeDtypeStruct((16, 8), jnp.int32)
    batch = {"tokens": ids, "targets": ids}
    # Nothing annotated here: the table's rows are over tensor, its columns over fsdp.
    plan = st.plan(lambda rngs: Llama(rngs=rngs), loss, optax.sgd(0.1), batch, "fsdp=4,tensor=2")
    assert {c.kind for c in plan.collectives()} == {"all-gather", "all-reduce"}


def test_rows_stay_apart_where_gradients_are_reduced_once(devices):
    """Each replica has two rows per microbatch, one on each `fsdp` device: none is gathered."""
    plan = plan_of("data=2,fsdp=2,tensor=2,num_microbatches=4,sequence_parallel=True")
    gathered = [c for c in plan.collectives() if c.kind == "all-gather" and "fsdp" in c.axes]
    stream = 2 * LENGTH * CONFIG.embed_dim * 4
    assert gathered
    assert not [c for c in gathered if not c.parameter and c.bytes >= stream]
