"""A run of `st.fit` that may kill itself: `DIRECTORY NUM_STEPS KILL_AT [lost|term]`.

With `lost` nothing is saved to disk on the way, only to memory, and the process that dies takes the
memory of its host with it. With `term` process 1 gets a SIGTERM instead. Writes `seen.jsonl`: for
every step taken, the examples this process read and the loss.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import shardtrain as st
from shardtrain.checkpoint import as_text, fingerprint
from shardtrain.checkpoint.leaves import named_leaves
from shardtrain.recovery.saved import _folder

directory, num_steps, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
lost, term = sys.argv[4:] == ["lost"], sys.argv[4:] == ["term"]
first_try = not (directory / "seen.jsonl").exists()
st.init_distributed()
examples = 40
random = np.random.default_rng(0)
columns = {
    "id": np.arange(examples, dtype=np.int32),
    "x": random.normal(size=(examples, 8)).astype(np.float32),
    "y": random.integers(0, 4, examples).astype(np.int32),
}


def write(record):
    with (directory / "seen.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


class Loader(st.DataLoader):
    """Notes which examples this process's devices get."""

    def batch(self, step, sharding=None):
        batch = super().batch(step, sharding)
        mine = {int(i) for s in batch["id"].addressable_shards for i in np.asarray(s.data)}
        write({"step": step + 1, "process": jax.process_index(), "examples": sorted(mine)})
        return batch


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.up(x))))


class Watch(st.Callback):
    def on_step(self, step, metrics):
        write({"step": step, "loss": metrics["loss"].hex()})
        if lost and step == kill_at and jax.process_index() == 1 and first_try:
            shutil.rmtree(_folder(directory / "run") / "process-1")
            os.kill(os.getpid(), signal.SIGKILL)
        if term and step == kill_at and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == kill_at and not (lost or term):
            os.kill(os.getpid(), signal.SIGKILL)


loader = Loader(columns, 8, seed=1)
plan = st.plan(
    Model,
    lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"]),
    optax.adamw(1e-2),
    loader.abstract_batch,
    "data=2,fsdp=2",
)
result = st.fit(
    plan,
    loader,
    num_steps,
    directory / "run",
    [Watch()],
    save_every=None if lost else 7,
    snapshot_every=1 if lost else None,
    progress=False,
)
if jax.process_index() == 0:
    state = as_text(fingerprint(named_leaves(result.state)))
    (directory / "final.json").write_text(json.dumps(state))
