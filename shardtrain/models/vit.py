"""A small vision transformer (Dosovitskiy et al. 2021), mean-pooled."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import ModelError
from shardtrain.models.layers import Attention, RMSNorm, SwiGLU, named


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`.

    Args:
      image_size: Height and width of the square images.
      channels: Of the images.
      patch_size: Height and width of a patch; divides `image_size`.
      num_classes: Classes.
      num_layers: Blocks.
      embed_dim: Width of the residual stream.
      num_heads: Attention heads; divides `embed_dim`.
      mlp_dim: Width inside SwiGLU.

    Raises:
      ModelError: Patches or heads do not divide.
    """

    image_size: int = 32
    channels: int = 3
    patch_size: int = 4
    num_classes: int = 10
    num_layers: int = 6
    embed_dim: int = 192
    num_heads: int = 6
    mlp_dim: int = 512

    def __post_init__(self) -> None:
        for whole, part in (("image_size", "patch_size"), ("embed_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ModelError(
                    f"{part}={getattr(self, part)} does not divide {whole}={getattr(self, whole)}"
                )

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2


def patches(images: jax.Array, size: int) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H/size * W/size, size * size * C]`."""
    rows, height, width, channels = images.shape
    grid = images.reshape(rows, height // size, size, width // size, size, channels)
    return grid.swapaxes(2, 3).reshape(rows, -1, size * size * channels)


class ViTBlock(nnx.Module):
    """Attention over all patches and SwiGLU, each behind a norm."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width, heads = config.embed_dim, config.num_heads
        self.attention_norm = RMSNorm(width, rngs=rngs)
        self.attention = Attention(
            width, heads, heads, width // heads, causal=False, rope_theta=None, rngs=rngs
        )
        self.mlp_norm = RMSNorm(width, rngs=rngs)
        self.mlp = SwiGLU(width, config.mlp_dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, patches, embed]` -> `[B, patches, embed]`."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ViT(nnx.Module):
    """Images to class logits.

    Args:
      config: Sizes.
      rngs: Random streams.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width = config.embed_dim
        inputs = config.patch_size**2 * config.channels
        init = nnx.initializers.lecun_normal()
        self.patch = nnx.Linear(inputs, width, kernel_init=named(init, None, "embed"), rngs=rngs)
        position_init = named(nnx.initializers.normal(0.02), "position", "embed")
        self.position = nnx.Param(position_init(rngs.params(), (config.num_patches, width)))
        self.blocks = nnx.List([ViTBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(
            width, config.num_classes, kernel_init=named(init, "embed", None), rngs=rngs
        )
        self.patch_size = config.patch_size

    def __call__(self, images: jax.Array) -> jax.Array:
        """float `[B, H, W, C]` -> logits `[B, classes]`."""
        x = self.patch(patches(images, self.patch_size)) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
