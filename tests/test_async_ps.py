"""Asynchronous parameter server: the clock alone, and real processes that die and join."""

import threading
import time

import async_job
import jax
import numpy as np
import pytest

import shardtrain as st
from shardtrain.async_ps.clock import Clock
from shardtrain.errors import StrategyError


def test_the_clock_bounds_how_far_ahead_anyone_runs():
    clock = Clock(num_steps=10, max_staleness=2)
    assert [clock.next(w) for w in (0, 1, 2)] == [0, 1, 2]
    clock.done(1, 1, 0.0, 0)
    clock.done(2, 2, 0.0, 0)
    got = []
    waiting = threading.Thread(target=lambda: got.append(clock.next(1)))
    waiting.start()
    waiting.join(0.2)
    assert got == []  # step 0 is unfinished: step 3 must wait
    clock.done(0, 0, 0.0, 0)
    waiting.join(5)
    assert got == [3]


def test_the_step_of_a_dead_worker_comes_first_and_the_dead_get_none():
    clock = Clock(num_steps=3, max_staleness=5)
    assert (clock.next(0), clock.next(1)) == (0, 1)
    clock.lost(0)
    assert clock.next(0) is None
    assert clock.next(2) == 0
    clock.done(2, 0, 0.5, 1)
    clock.lost(2)
    assert clock.next(1) == 2  # step 0 was done before its worker died
    assert clock.progress() == 1


def test_all_are_released_when_everything_is_done():
    clock = Clock(num_steps=1, max_staleness=0)
    assert clock.next(0) == 0
    got = []
    waiting = threading.Thread(target=lambda: got.append(clock.next(1)))
    waiting.start()
    clock.done(0, 0, 1.0, 0)
    waiting.join(5)
    assert got == [None]


def test_a_worker_is_killed_another_joins_and_every_step_counts_once():
    """Two servers, two workers of unequal speed; both are killed, a third does the rest."""
    steps, bound = 24, 3
    with st.async_ps(
        async_job.linear_job, steps, num_servers=2, max_staleness=bound, delays=(0.05, 0.2)
    ) as run:
        while run.progress < 5:
            time.sleep(0.02)
        run.kill(1)
        joined = run.add_worker()
        run.kill(0)
        result = run.wait()
    assert [u.step for u in result.updates] == list(range(steps))
    assert [sorted(steps_of) for steps_of in result.applied] == [list(range(steps))] * 2
    assert max(u.staleness for u in result.updates) <= 2 * bound
    workers = [u.worker for u in result.updates]
    assert workers[-1] == joined
    start = async_job.init(jax.random.key(0))
    mean = np.mean([async_job.batch(t)["x"].mean(axis=0) for t in range(steps)], axis=0)
    moved = 0.01 * steps * mean
    np.testing.assert_allclose(result.params["c"], 1 - moved, rtol=1e-4)
    np.testing.assert_allclose(result.params["b"], np.full(4, -0.01 * steps), rtol=1e-4)
    wanted = np.asarray(start["a"]["w"]) - moved[:, None]
    np.testing.assert_allclose(result.params["a"]["w"], wanted, rtol=1e-4, atol=1e-5)


def test_without_staleness_it_is_the_synchronous_run(devices):
    job = async_job.squares_job()
    with st.async_ps(async_job.squares_job, 6, num_workers=2, max_staleness=0) as run:
        result = run.wait()
    args = (job.model, job.loss_fn, job.optimizer, job.batch(0), "data=1")
    plan = st.plan(*args, devices=devices[:1])
    state, losses = plan.init(0), []
    for step in range(6):
        state, metrics = plan.step(state, job.batch(step))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose([u.loss for u in result.updates], losses, rtol=1e-5)
    assert [u.staleness for u in result.updates] == [0] * 6
    for mine, theirs in zip(
        jax.tree.leaves(result.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(mine, np.asarray(theirs), rtol=1e-5, atol=1e-6)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(StrategyError, match="num_workers=0"):
        st.async_ps(async_job.linear_job, 4, num_workers=0)
