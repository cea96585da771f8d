"""Small models and helpers that the tests of `shardtrain.sync` share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardtrain as st
from shardtrain.pytree import leaves_by_path

RANDOM = np.random.default_rng(0)
BATCH = {
    "x": RANDOM.normal(size=(32, 16)).astype(np.float32),
    "y": RANDOM.integers(0, 8, 32).astype(np.int32),
    "mask": (np.arange(32) % 5 != 0).astype(np.float32),  # replicas with unequal weights
}
TENSOR = {"*up": (None, "tensor"), "*bias": ("tensor",), "*down": ("tensor", None)}


def init(key):
    a, b = jax.random.split(key)
    return {
        "up": 0.2 * jax.random.normal(a, (16, 32)),
        "bias": jnp.zeros((32,)),
        "down": 0.2 * jax.random.normal(b, (32, 8)),
    }


def loss(v, batch):
    logits = jnp.tanh(batch["x"] @ v["up"] + v["bias"]) @ v["down"]
    return st.cross_entropy(logits, batch["y"], batch["mask"])


def make_plan(strategy, optimizer=None, **options):
    optimizer = optimizer or optax.adam(1e-2)
    return st.plan(st.Functional(init=init), loss, optimizer, BATCH, strategy, **options)


def train(plan, steps=4, state=None, batch=BATCH):
    """The state after some steps, and the metrics of each."""
    state = plan.init(0) if state is None else state
    history = []
    for _ in range(steps):
        state, metrics = plan.step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    assert plan.trace_counts["step"] == 1
    return state, history


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    """Two trees hold the same numbers."""
    a, b = leaves_by_path(a), leaves_by_path(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(
            np.asarray(a[path]), np.asarray(b[path]), rtol, atol, err_msg=path
        )


def large(plan, least=16):
    """`(kind, bytes)` of the collectives over replicas that are not a few scalars."""
    return [
        (c.kind, c.bytes)
        for c in plan.collectives()
        if "data" in c.within + c.axes and c.bytes > least
    ]
