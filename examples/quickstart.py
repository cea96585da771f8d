"""Shard a Flax model of your own: eight virtual devices, two axes, nothing changed in the model."""

import flax.nnx as nnx
import jax
import numpy as np
import optax

import shardtrain as st


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(32, 256, rngs=rngs)
        self.out = nnx.Linear(256, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.hidden(x)))


st.simulate(8)  # leave this out where there are real devices
rng = np.random.default_rng(0)
x = rng.normal(size=(4096, 32)).astype("float32")
data = st.DataLoader({"x": x, "y": np.argmax(x[:, :4], axis=1)}, global_batch_size=64)

plan = st.plan(
    Classifier,
    lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"]),
    optax.adam(1e-2),
    data.abstract_batch,
    "data=2,fsdp=4",
)
print(plan.explain())
result = st.fit(plan, data, num_steps=60)
print(f"loss {result.history[0]['loss']:.2f} -> {result.history[-1]['loss']:.2f}")
