"""Multilayer perceptrons: Linen, NNX, and plain functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import shardtrain as st
from zoo.case import Case, features


class LinenMLP(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(self.width)(x))
        x = nn.LayerNorm()(x)
        x = nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(8)(x)


class NnxMLP(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.second = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def squared(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def squared_sum(model, batch):
    error = (model(batch["x"]) - batch["y"]) ** 2
    return st.Mean(jnp.sum(error), error.size), {"largest": st.Mean(jnp.sum(error**2), error.size)}


def init_plain(key):
    a, b = jax.random.split(key)
    return {
        "w": [0.3 * jax.random.normal(a, (16, 32)), 0.3 * jax.random.normal(b, (32, 8))],
        "scale": jnp.ones(()),
    }


def plain_loss(variables, batch):
    hidden = jnp.tanh(batch["x"] @ variables["w"][0])
    error = (variables["scale"] * (hidden @ variables["w"][1]) - batch["y"]) ** 2
    return st.Mean(jnp.sum(error), error.size)


CASES = (
    Case("mlp-linen", LinenMLP, squared, features, scalar=True),
    Case("mlp-nnx", lambda: lambda rngs: NnxMLP(rngs=rngs), squared_sum, features),
    Case("functional", lambda: st.Functional(init=init_plain), plain_loss, features),
)
