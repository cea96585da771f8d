"""Layers under a scan, with a leading layer dim: Linen `nn.scan`, and a stacked NNX module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from zoo.case import VOCAB, Case, tokens
from zoo.decoders import given_targets, next_token, shifted


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y, mask=mask)
        y = nn.Dense(32)(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(y)), None


class ScannedTransformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCAB, 16)(ids)
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(ids))
        return nn.Dense(VOCAB)(nn.LayerNorm()(x))


class Mixer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        seen = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]
        return x + self.down(nnx.gelu(self.up(self.norm(seen))))


class StackedNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(VOCAB, 16, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return Mixer(rngs)

        self.layers = stack(rngs)
        self.head = nnx.Linear(16, VOCAB, rngs=rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jax.checkpoint(lambda y: y)(layer(x))

        return self.head(run(self.layers, self.embed(ids)))


CASES = (
    Case("scan-linen", ScannedTransformer, next_token, tokens),
    Case("scan-nnx", lambda: lambda rngs: StackedNnx(rngs=rngs), next_token, tokens),
    Case("scan-linen-targets", ScannedTransformer, given_targets, shifted),
    Case("scan-nnx-targets", lambda: lambda rngs: StackedNnx(rngs=rngs), given_targets, shifted),
)
