"""A small model under any strategy, for checkpoints that move between layouts."""

import jax
import numpy as np
import optax
from flax import nnx

import shardtrain as st

WIDTH = 8


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(nnx.gelu(self.up(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(4)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["tokens"]), batch["targets"], batch["mask"])


def make_plan(strategy, count):
    """Of the first `count` devices; nothing is computed yet."""
    batch = {
        "tokens": np.zeros((16, 4), np.int32),
        "targets": np.zeros((16, 4), np.int32),
        "mask": np.ones((16, 4), np.float32),
    }
    devices = jax.devices()[:count]
    return st.plan(Model, loss_fn, optax.adam(1e-2), batch, strategy, devices=devices)
