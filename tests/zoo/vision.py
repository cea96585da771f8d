"""A vision transformer in Linen, the way the published code writes it."""

import flax.linen as nn
import jax.numpy as jnp

from zoo.case import Case, images
from zoo.convs import loss


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
        y = nn.Dense(64)(nn.LayerNorm()(x))
        return x + nn.Dense(32)(nn.gelu(y))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Conv(32, (4, 4), (4, 4), padding="VALID", name="patches")(image)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("cls", nn.initializers.normal(0.02), (1, 1, 32))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 32))
        for layer in range(2):
            x = EncoderBlock(name=f"block_{layer}")(x)
        return nn.Dense(8, name="head")(nn.LayerNorm()(x)[:, 0])


CASES = (Case("vit", ViT, loss, images),)
