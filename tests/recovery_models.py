"""The small network that the tests of going on and going back train: dropout makes keys matter."""

from flax import nnx

import shardtrain as st


class Network(nnx.Module):
    """Two layers, 8 numbers to 4 classes."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.up(x))))


def loss_fn(model, batch):
    """Cross-entropy of `y` given `x`."""
    return st.cross_entropy(model(batch["x"]), batch["y"])
