"""Fine-tune with low-rank corrections: digits learnt as they are, then adapted to negatives."""

import flax.nnx as nnx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import shardtrain as st


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 512, rngs=rngs)
        self.middle = nnx.Linear(512, 512, rngs=rngs)
        self.out = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.middle(jax.nn.relu(self.hidden(x)))))


def loss(model, batch):
    return st.cross_entropy(model(batch["x"]), batch["y"])


def train(model, x, y, steps, variables=None):
    data = st.DataLoader({"x": x, "y": y}, global_batch_size=128)
    plan = st.plan(model, loss, optax.adam(3e-3), data.abstract_batch, "fsdp=4,tensor=2")
    result = st.fit(plan, data, steps, state=plan.init(variables=variables), progress=False)
    return plan, result.state, result.history[-1]["loss"]


def main():
    st.simulate(8)  # leave this out where there are real devices
    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target
    base, state, last = train(Classifier, x, y, steps=60)
    trained = base.model(state)
    score = lambda model, x: float((np.asarray(model(x)).argmax(-1) == y).mean())
    print(f"digits: loss {last:.3f}, accuracy {score(trained, x):.3f}")
    print(f"negatives, before: accuracy {score(trained, 1 - x):.3f}")

    plan, state, last = train(
        st.lora(Classifier, rank=4, alpha=32, train="**/bias"),
        1 - x,
        y,
        steps=500,
        variables=trained,
    )
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    share = count(state.params) / count(state.variables["frozen"])
    print(f"trained {count(state.params)} numbers, {share:.1%} of the model's")
    adapted = plan.model(state)  # the same class, its kernels corrected
    print(f"negatives, after: accuracy {score(adapted, 1 - x):.3f}")
    return score(adapted, 1 - x)


if __name__ == "__main__":
    main()
