"""One of two processes: runs in which process 1 is not like process 0, and what each is told."""

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import shardtrain as st
from shardtrain.errors import DistributedError
from shardtrain.recovery import preflight

st.init_distributed()
odd = jax.process_index() == 1
random = np.random.default_rng(0)
columns = {
    "x": random.normal(size=(64, 4)).astype(np.float32),
    "y": random.integers(0, 2, 64).astype(np.int32),
}
KNOWN = np.linspace(0, 63, 8).astype(int)  # the examples that the data's fingerprint looks at


def other_files():
    """The same length and the same fingerprint, but other examples in between."""
    x = columns["x"].copy()
    x[np.setdiff1d(np.arange(64), KNOWN)] += odd
    return st.DataLoader({**columns, "x": x}, 16)


def other_vocabulary():
    """A transform that reads a file of its own, as a tokenizer does."""
    return st.DataLoader(
        columns, 16, transform=lambda example: {**example, "y": example["y"] ^ odd}
    )


def other_order():
    """Weights of its own: the same examples, drawn in another order."""
    return st.DataLoader(columns, 16, weights=np.arange(64) + 1.0 + odd * 50)


def other_noise():
    """Augmentation with a generator that nobody seeded alike."""
    own = np.random.default_rng(jax.process_index())
    noisy = lambda example: {**example, "x": example["x"] + own.normal(size=4).astype(np.float32)}
    return st.DataLoader(columns, 16, transform=noisy)


def same_noise():
    """Augmentation as it should be."""
    noisy = lambda example, rng: {
        **example, "x": example["x"] + rng.normal(size=4).astype(np.float32)
    }  # fmt: skip
    return st.DataLoader(columns, 16, transform=noisy)


@contextlib.contextmanager
def other_version():
    """An installation whose optax is not that of the others."""
    installed = preflight.metadata.version
    preflight.metadata.version = lambda name: "0.0" if odd and name == "optax" else installed(name)
    yield
    preflight.metadata.version = installed


def make_plan(loader, width=8, rate=0.1):
    def model(rngs):
        return nnx.Sequential(nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs))

    loss = lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"])
    return st.plan(model, loss, optax.sgd(rate), loader.abstract_batch, "data=2,fsdp=2")


def told(plan, loader, **options):
    try:
        result = st.fit(plan, loader, 2, progress=False, **options)
    except DistributedError as error:
        return str(error)
    return f"done {len(result.history)}"


good = st.DataLoader(columns, 16)
plan = make_plan(good)
with other_version():
    version = told(plan, good)
wide = st.DataLoader({**columns, "y": columns["y"].astype("int32" if not odd else "uint8")}, 16)
report = {
    "other files": told(plan, other_files()),
    "other vocabulary": told(plan, other_vocabulary()),
    "other order": told(plan, other_order()),
    "other noise": told(plan, other_noise()),
    "other dtype": told(make_plan(wide), wide),
    "other learning rate": told(make_plan(good, rate=0.2 if odd else 0.1), good),
    "other width": told(make_plan(good, width=16 if odd else 8), good),
    "other version": version,
    "other eval data": told(plan, good, eval_loader=other_files() if odd else None),
    "other settings": told(plan, good, save_every=1 if odd else 2),
    "same": told(plan, same_noise()),
}
Path(sys.argv[1], f"report-{jax.process_index()}.json").write_text(json.dumps(report))
