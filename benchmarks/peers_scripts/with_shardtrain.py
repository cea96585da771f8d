"""One program with shardtrain; see `peers.py`."""

import optax

import shardtrain as st
from shardtrain.models import Decoder


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["targets"])


def start(config, batch, num_devices, layout):
    plan = st.plan(
        lambda rngs: Decoder(config, rngs=rngs),
        loss_fn,
        optax.adamw(1e-3),
        batch,
        f"{layout}={num_devices}",
    )

    def step(state, batch):
        state, metrics = plan.step(state, batch)
        return state, metrics["loss"]

    return plan.init(seed=0), step
