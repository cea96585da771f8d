"""ZeRO levels: exact bytes on each device by class, and the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain.pytree import leaves_by_path

BATCH = {"x": np.linspace(-1, 1, 16 * 64, dtype=np.float32).reshape(16, 64)}
PARAMS = 4 * (64 * 32 + 32 + 32 * 16)  # bytes of the parameters below in float32: 10,368
SCALARS = 4  # Adam's count


def init(key):
    a, b = jax.random.split(key)
    return {
        "up": jax.random.normal(a, (64, 32)),
        "bias": jnp.zeros((32,)),
        "down": jax.random.normal(b, (32, 16)),
    }


def loss(v, batch):
    y = jnp.tanh(batch["x"] @ v["up"] + v["bias"]) @ v["down"]
    return st.Mean(jnp.sum(y**2), y.size)


def plan_of(strategy, optimizer=None, **options):
    optimizer = optimizer or optax.adam(1e-2)
    return st.plan(st.Functional(init=init), loss, optimizer, BATCH, strategy, **options)


@pytest.mark.parametrize(
    ("strategy", "params", "grads", "optimizer"),
    [
        ("data=8", PARAMS, PARAMS, 2 * PARAMS + SCALARS),
        ("fsdp=8,zero=0", PARAMS, PARAMS, 2 * PARAMS + SCALARS),
        ("fsdp=8,zero=1", PARAMS, PARAMS, 2 * PARAMS // 8 + SCALARS),
        ("fsdp=8,zero=2", PARAMS, PARAMS // 8, 2 * PARAMS // 8 + SCALARS),
        ("fsdp=8,zero=3", PARAMS // 8, PARAMS // 8, 2 * PARAMS // 8 + SCALARS),
        ("data=2,fsdp=4", PARAMS // 4, PARAMS // 4, 2 * PARAMS // 4 + SCALARS),
        ("data=2,fsdp=4,zero=1", PARAMS, PARAMS, 2 * PARAMS // 4 + SCALARS),
    ],
)
def test_bytes_on_each_device(strategy, params, grads, optimizer):
    memory = plan_of(strategy, hardware="cpu:8").memory()
    assert (memory.params, memory.grads, memory.optimizer) == (params, grads, optimizer)
    assert memory.batch == 16 * 64 * 4 // 8


@pytest.fixture(scope="module")
def one_device(devices):
    return trained("data=1", devices[:1])


def trained(strategy, devices):
    plan = plan_of(strategy, devices=devices)
    state, history = plan.init(0), []
    for _ in range(3):
        state, metrics = plan.step(state, BATCH)
        history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return plan, state, history


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_levels_train_alike_and_hold_what_they_say(devices, one_device, zero):
    plan, state, history = trained(f"data=2,fsdp=4,zero={zero}", devices)
    np.testing.assert_allclose(history, one_device[2], rtol=1e-5)
    for path, leaf in leaves_by_path(state.params).items():
        wanted = leaves_by_path(one_device[1].params)[path]
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(wanted), rtol=1e-4, atol=1e-5)
    # What the arrays really hold, not what was planned.
    held = lambda tree: sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)
    )
    assert held(state.params) == (PARAMS // 4 if zero == 3 else PARAMS)
    assert held(state.opt_state) == 2 * PARAMS // (4 if zero else 1) + SCALARS
    assert plan.memory().params == held(state.params)


def test_hsdp_shards_within_fsdp_and_copies_over_data(devices):
    plan = plan_of("data=2,fsdp=4")
    state = plan.init(0)
    up = state.params["up"]
    assert up.sharding.spec == P("fsdp")
    rows = {}
    for shard in up.addressable_shards:
        rows.setdefault(shard.index[0].start or 0, []).append(shard.device.id)
    assert rows == {0: [0, 4], 16: [1, 5], 32: [2, 6], 48: [3, 7]}


def test_gradients_reach_their_shards_without_all_to_all(devices):
    """ZeRO-3: parameters gathered, gradients scattered or reduced; nothing exchanged all to all."""
    kinds = {c.kind for c in plan_of("fsdp=8").collectives()}
    assert "all-gather" in kinds
    assert "all-to-all" not in kinds
    assert "collective-permute" not in kinds
