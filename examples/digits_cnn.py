"""A Linen CNN with BatchNorm and dropout on real handwritten digits, data-parallel over 8 devices.

The model is plain Flax; batch statistics are those of the whole global batch, as on one device.
Needs scikit-learn for its 1,797 digits of 8 x 8 pixels (`pip install scikit-learn`).
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import shardtrain as st


class CNN(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool):
        x = images
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(x))


def loss_fn(model, batch, train):
    logits = model(batch["image"], train)
    hits = jnp.argmax(logits, axis=-1) == batch["label"]
    accuracy = st.Mean(jnp.sum(hits), hits.size)
    return st.cross_entropy(logits, batch["label"]), {"accuracy": accuracy}


def shift(example, rng):
    """Augmentation: move the digit by up to one pixel; the same on any number of devices."""
    down, right = rng.integers(-1, 2, size=2)
    image = np.roll(example["image"], (down, right), axis=(0, 1))
    return {**example, "image": image}


def main(num_steps: int = 250) -> float:
    st.simulate(8)  # leave this out where there are real devices
    digits = load_digits()
    columns = {
        "image": (digits.images[..., None] / 16).astype("float32"),
        "label": digits.target.astype("int32"),
    }
    order = np.random.default_rng(0).permutation(len(digits.target))
    train_rows, test_rows = order[:1397], order[1397:]
    train_data = st.DataLoader({k: v[train_rows] for k, v in columns.items()}, 64, transform=shift)
    test_data = st.DataLoader({k: v[test_rows] for k, v in columns.items()}, 64)

    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, num_steps))
    plan = st.plan(CNN(), loss_fn, optimizer, train_data.abstract_batch, "data=8")
    result = st.fit(plan, train_data, num_steps)
    test = st.evaluate(plan, result.state, test_data)
    print(f"test accuracy {test['accuracy']:.2%} on {test['weight']:.0f} digits")
    return test["accuracy"]


if __name__ == "__main__":
    main()
