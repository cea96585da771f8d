"""A convolutional classifier in Flax Linen, with BatchNorm and dropout."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class CNN(nn.Module):
    """Images to class logits.

    Args:
      num_classes: Classes.
      features: Channels of each stage; a stage halves height and width.
      hidden: Width of the layer before the last.
      dropout: Share of that layer that is dropped in training.
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 64)
    hidden: int = 128
    dropout: float = 0.3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """float `[B, H, W, C]` -> logits `[B, classes]`."""
        x = images
        for features in self.features:
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(nn.Dropout(self.dropout, deterministic=not train)(x))
