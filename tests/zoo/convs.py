"""Convolutional networks: BatchNorm, residual stages, grouped and depthwise kernels."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

import shardtrain as st
from zoo.case import Case, images


class ConvNet(nn.Module):
    """Convolution, BatchNorm and dropout, as in a digits tutorial."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(8)(x)


class ResidualBlock(nn.Module):
    filters: int
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.filters, (3, 3), (self.strides, self.strides), use_bias=False)(x)
        y = nn.relu(nn.GroupNorm(num_groups=4)(y))
        y = nn.Conv(self.filters, (3, 3), use_bias=False)(y)
        y = nn.GroupNorm(num_groups=4)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.filters, (1, 1), (self.strides, self.strides), name="proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = ResidualBlock(8)(x)
        x = ResidualBlock(16, 2)(x)
        return nn.Dense(8)(x.mean(axis=(1, 2)))


class Separable(nnx.Module):
    """A depthwise, a grouped and a pointwise convolution (ConvNeXt, ResNeXt)."""

    def __init__(self, *, rngs):
        self.depthwise = nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.grouped = nnx.Conv(
            8, 16, (3, 3), strides=2, kernel_dilation=2, feature_group_count=2, rngs=rngs
        )
        self.pointwise = nnx.Conv(16, 16, (1, 1), rngs=rngs)
        self.head = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.depthwise(x))
        x = nnx.gelu(self.grouped(x))
        return self.head(nnx.gelu(self.pointwise(x)).mean(axis=(1, 2)))


def train_loss(model, batch, train=True):
    return st.cross_entropy(model(batch["image"], train=train), batch["label"])


def loss(model, batch):
    logits = model(batch["image"])
    hits = jnp.argmax(logits, -1) == batch["label"]
    metrics = {"accuracy": st.Mean(jnp.sum(hits), hits.size)}
    return st.cross_entropy(logits, batch["label"]), metrics


CASES = (
    Case("conv-batchnorm", ConvNet, train_loss, images, splits=False, tolerance=2e-5),
    Case("resnet", ResNet, loss, images),
    Case("grouped-conv", lambda: lambda rngs: Separable(rngs=rngs), loss, images),
)
