"""A run of `st.fit` that may kill itself: `DIRECTORY NUM_STEPS KILL_AT [lost|term|gone|slow]`.

With `lost` nothing is saved to disk on the way, only to memory, and the process that dies takes the
memory of its host with it. With `term` process 1 gets a SIGTERM instead. With `gone` process 1 dies
there every time it is started. With `slow` nobody dies: process 1 is slow to read. Writes
`seen.jsonl`: for every step taken, the examples this process read and the loss.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from recovery_models import Network, loss_fn

import shardtrain as st
from shardtrain.checkpoint import as_text, fingerprint
from shardtrain.checkpoint.leaves import named_leaves
from shardtrain.recovery.saved import _folder

directory, num_steps, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
mode = sys.argv[4] if len(sys.argv) > 4 else "kill"
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
        if mode == "slow" and jax.process_index() == 1:
            time.sleep(0.05)
        mine = {int(i) for s in batch["id"].addressable_shards for i in np.asarray(s.data)}
        write({"step": step + 1, "process": jax.process_index(), "examples": sorted(mine)})
        return batch


class Watch(st.Callback):
    def on_step(self, step, metrics):
        write({"step": step, "loss": metrics["loss"].hex()})
        if step == kill_at:
            die()


def die():
    odd = jax.process_index() == 1
    if mode == "lost" and odd and first_try:
        shutil.rmtree(_folder(directory / "run") / "process-1")
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "term" and odd:
        os.kill(os.getpid(), signal.SIGTERM)
    if mode == "kill" or (mode == "gone" and odd):
        os.kill(os.getpid(), signal.SIGKILL)


loader = Loader(columns, 8, seed=1)
plan = st.plan(
    Network,
    loss_fn,
    optax.adamw(1e-2),
    loader.abstract_batch,
    f"data=2,fsdp={jax.device_count() // 2}",
)
result = st.fit(
    plan,
    loader,
    num_steps,
    directory / "run",
    [Watch()],
    save_every=None if mode == "lost" else 7,
    snapshot_every=1 if mode == "lost" else None,
    progress=False,
)
if jax.process_index() == 0:
    state = as_text(fingerprint(named_leaves(result.state)))
    (directory / "final.json").write_text(json.dumps(state))
