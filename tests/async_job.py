"""Jobs of `tests/test_async_ps.py`: every process imports them from here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardtrain as st

ROWS = np.random.default_rng(0).normal(size=(64, 8, 6)).astype(np.float32)


def batch(step):
    return {"x": ROWS[step % 64]}


def init(key):
    return {"a": {"w": jax.random.normal(key, (6, 4))}, "b": jnp.zeros((4,)), "c": jnp.ones((6,))}


def linear(v, batch):
    """The gradient is the same wherever it is computed: the order of updates does not matter."""
    total = jnp.sum(batch["x"] @ v["a"]["w"]) + 8 * jnp.sum(v["b"]) + jnp.sum(batch["x"] @ v["c"])
    return st.Mean(total, jnp.float32(batch["x"].shape[0]))


def squares(v, batch):
    y = jnp.tanh(batch["x"] @ v["a"]["w"] + v["b"]) @ jnp.ones(4) - batch["x"] @ v["c"]
    return st.Mean(jnp.sum(y**2), jnp.float32(y.shape[0]))


def linear_job():
    return st.AsyncJob(st.Functional(init=init), linear, optax.sgd(0.01), batch)


def squares_job():
    return st.AsyncJob(st.Functional(init=init), squares, optax.adam(0.05), batch)
