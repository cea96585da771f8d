"""Parameter server: all-reduce at staleness 0; else late by exactly k, off the critical path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sync_models import BATCH, TENSOR, assert_close, init, large, loss, make_plan, train

import shardtrain as st
from shardtrain.planner.hlo import parse_hlo

EXPLICIT = st.AllReduce(explicit=True)
SGD = optax.sgd(0.2)


@pytest.fixture(scope="module")
def all_reduce(devices):
    return train(make_plan(st.Strategy(data=8, sync=EXPLICIT), SGD))


def test_staleness_0_is_all_reduce_to_the_bit(all_reduce):
    """The same reduce-scatter adds in the same order, and SGD treats every number alone."""
    state, history = train(make_plan(st.Strategy(data=8, sync=st.ParameterServer()), SGD))
    assert_close(state.params, all_reduce[0].params, 0, 0)
    assert [m["loss"] for m in history] == [m["loss"] for m in all_reduce[1]]


@pytest.mark.parametrize(
    "strategy",
    [
        st.Strategy(data=4, fsdp=2, num_microbatches=2),
        st.Strategy(data=2, fsdp=2, tensor=2, rules=TENSOR),
    ],
    ids=str,
)
def test_inside_a_replica_other_axes_may_split(all_reduce, strategy):
    state, _ = train(make_plan(strategy.replace(sync=st.ParameterServer()), SGD))
    assert_close(state.params, all_reduce[0].params)


def test_push_update_at_the_owner_pull(devices):
    """800 numbers in three arrays; Adam's two moments are divided by the 8 owners."""
    plan = make_plan(st.Strategy(data=8, sync=st.ParameterServer()))
    found = [c for c in large(plan) if c[0] != "all-reduce"]
    assert found[0] == ("reduce-scatter", 3200)
    assert sorted(found[1:]) == [("all-gather", 128), ("all-gather", 1024), ("all-gather", 2048)]
    assert plan.memory().optimizer == 2 * 3200 // 8 + 4


def test_compressed_push(devices):
    """The push is bytes; what rounding left out comes with the next one."""
    plan = make_plan(st.Strategy(data=8, sync=st.ParameterServer(), compression=st.Int8()), SGD)
    # Of three arrays a part for each owner, padded to a block of 256, and its scale.
    assert large(plan)[0] == ("all-to-all", 8 * 3 * (256 + 4))
    state, history = train(plan, 30)
    _, exact = train(make_plan("data=8", SGD), 30)
    assert history[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=5e-3)
    assert float(jnp.abs(state.sync.parts["error"]["up"]).max()) > 0


def by_hand(steps, staleness, compensation=0.0):
    """Delayed SGD as the papers write it, on one device."""
    params = init(jax.random.key(0))
    batch = {k: jnp.asarray(v) for k, v in BATCH.items()}
    grad = jax.jit(jax.grad(lambda p: loss(p, batch).value))
    waiting = []
    for _ in range(steps):
        waiting.append((params, grad(params)))
        if len(waiting) > staleness:
            then, g = waiting.pop(0)
            params = jax.tree.map(
                lambda p, g, t: p - 0.2 * (g + compensation * g * g * (p - t)), params, g, then
            )
    return params


@pytest.mark.parametrize(
    ("staleness", "compensation"), [(1, 0.0), (3, 0.0), (1, 5.0), (2, 5.0)], ids=str
)
def test_gradients_are_late_by_exactly_k_steps(devices, staleness, compensation):
    sync = st.ParameterServer(staleness, compensation)
    state, history = train(make_plan(st.Strategy(data=4, fsdp=2, sync=sync), SGD), 6)
    assert_close(state.params, by_hand(6, staleness, compensation), 1e-5, 1e-6)
    assert [m["grad_norm"] > 0 for m in history] == [False] * staleness + [True] * (6 - staleness)
    assert int(state.skipped) == 0


def dots_before(hlo, opcode):
    """Whether a collective waits for a product of this very step."""
    module = parse_hlo(hlo)
    entry = module.computations[module.entry]
    by_name = {i.name: i for i in entry.instructions}
    (start,) = [i for i in entry.instructions if i.opcode == opcode]
    todo, seen, found = [start.name], set(), False
    while todo:
        node = by_name[todo.pop()]
        found |= node.opcode in ("dot", "custom-call") or "dot_general" in node.operation_name
        for name in node.operands:
            if name in by_name and name not in seen:
                seen.add(name)
                todo.append(name)
    return found


def test_with_staleness_the_push_waits_for_no_gradient(devices):
    hlo = lambda k: make_plan(st.Strategy(data=8, sync=st.ParameterServer(k)), SGD).compile().hlo
    assert dots_before(hlo(0), "reduce-scatter")
    assert not dots_before(hlo(1), "reduce-scatter")
    assert not dots_before(hlo(2), "reduce-scatter")


def test_a_bad_step_changes_nothing_and_the_late_gradients_wait(devices):
    plan = make_plan(st.Strategy(data=8, sync=st.ParameterServer(2)), SGD)
    bad = dict(BATCH, x=np.full_like(BATCH["x"], np.nan))
    state = plan.init(0)
    for batch in (BATCH, bad, BATCH, BATCH, bad, BATCH):
        state, _ = plan.step(state, batch)
    assert int(state.skipped) == 2
    assert_close(state.params, by_hand(4, 2))


@pytest.mark.parametrize("count", [4, 2])
def test_resume_is_exact_and_moves_to_fewer_replicas(devices, tmp_path, count):
    strategy = st.Strategy(data=4, sync=st.ParameterServer(2, 0.5))
    make = lambda n: make_plan(strategy.replace(data=n), SGD, devices=devices[:n])
    straight, _ = train(make(4), 6)
    half, _ = train(make(4), 3)
    with st.Checkpointer(tmp_path, make(4)) as saver:
        saver.save(half)
    plan = make(count)
    with st.Checkpointer(tmp_path, plan) as saver:
        found, _ = train(plan, 3, saver.restore())
    tolerance = {} if count != 4 else {"rtol": 0, "atol": 0}
    assert_close(found.params, straight.params, **tolerance)
