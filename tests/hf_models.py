"""A checkpoint that is not Hugging Face's own, and a model of somebody else's that takes it."""

import json

import flax.nnx as nnx
import jax
import ml_dtypes
import numpy as np
import optax
import safetensors.numpy

import shardtrain as st

WIDTH, LAYERS = 512, 4

MAPPING = {
    "layers.*.up.weight": ("layers/*/up/kernel", "transpose"),
    "layers.*.down.weight": ("layers/*/down/kernel", "transpose"),
    "layers.*.down.bias": "layers/*/down/bias",
}


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(jax.nn.tanh(self.up(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def loss_fn(model, batch):
    errors = (model(batch["x"]) - batch["y"]) ** 2
    return st.Mean(errors.sum(), errors.size)


def make_plan(strategy, devices=None, model=Model):
    batch = {name: np.ones((8, WIDTH), np.float32) for name in "xy"}
    return st.plan(model, loss_fn, optax.sgd(0.1), batch, strategy, devices=devices)


def tensors():
    """As PyTorch would name and store them."""
    numbers = np.random.default_rng(0)
    found = {}
    for n in range(LAYERS):
        found[f"layers.{n}.up.weight"] = numbers.normal(size=(WIDTH, WIDTH))
        found[f"layers.{n}.down.weight"] = numbers.normal(size=(WIDTH, WIDTH))
        found[f"layers.{n}.down.bias"] = numbers.normal(size=WIDTH)
    return {name: (0.1 * x).astype(np.float32) for name, x in found.items()}


def save(directory, values=None, dtype=np.float32):
    """Two files and their index; 8 MiB in float32."""
    values = {k: v.astype(dtype) for k, v in (tensors() if values is None else values).items()}
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(values)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in halves.items():
        safetensors.numpy.save_file({n: values[n] for n in mine}, directory / file)
    weights = {name: file for file, mine in halves.items() for name in mine}
    index = {"metadata": {}, "weight_map": weights}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


BFLOAT16 = ml_dtypes.bfloat16
