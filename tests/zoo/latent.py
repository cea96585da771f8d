"""Losses with sampled latents (VAE) and with pairs of examples (contrastive)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import shardtrain as st
from zoo.case import Case, features


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(32, name="encoder")(x))
        mean, log_variance = jnp.split(nn.Dense(16, name="moments")(hidden), 2, axis=-1)
        noise = jax.random.normal(self.make_rng("latent"), mean.shape)
        hidden = nn.relu(nn.Dense(32, name="decoder")(mean + jnp.exp(0.5 * log_variance) * noise))
        return nn.Dense(16, name="out")(hidden), mean, log_variance


def negative_elbo(model, batch):
    made, mean, log_variance = model(batch["x"])
    rebuilt = jnp.sum((made - batch["x"]) ** 2, axis=-1)
    divergence = 0.5 * jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)
    rows = made.shape[0]
    return st.Mean(jnp.sum(rebuilt + divergence), rows), {"kl": st.Mean(jnp.sum(divergence), rows)}


class TwoTower(nnx.Module):
    def __init__(self, *, rngs):
        self.left = nnx.Linear(16, 16, rngs=rngs)
        self.right = nnx.Linear(8, 16, rngs=rngs)
        self.temperature = nnx.Param(jnp.zeros(()))

    def __call__(self, x, y):
        unit = lambda v: v / jnp.linalg.norm(v, axis=-1, keepdims=True)
        scale = jnp.exp(self.temperature[...])
        return scale * unit(self.left(x)) @ unit(self.right(y)).T


def contrastive(model, batch):
    logits = model(batch["x"], batch["y"])
    rows = jnp.arange(logits.shape[0])
    there, back = st.cross_entropy(logits, rows), st.cross_entropy(logits.T, rows)
    return there + back


CASES = (
    Case("vae", VAE, negative_elbo, features, splits=False),
    Case(
        "contrastive",
        lambda: lambda rngs: TwoTower(rngs=rngs),
        contrastive,
        features,
        splits=False,
    ),
)
