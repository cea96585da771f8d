"""Fine-tune a Hugging Face checkpoint with low-rank corrections, and write it back.

`python finetune_hf.py [DIRECTORY]`: a checkpoint of the Llama, Qwen2, Qwen3 or GPT-2 family;
without one, the tiny random Llama that the tests use.
"""

import sys
from pathlib import Path

import numpy as np
import optax

import shardtrain as st
from shardtrain.models import from_hf_config

TINY = Path(__file__).parents[1] / "tests" / "data" / "hf" / "llama"

st.simulate(8)  # leave this out where there are real devices
source = Path(sys.argv[1]) if len(sys.argv) > 1 else TINY
rng = np.random.default_rng(0)
counting = (rng.integers(0, 64, (512, 1)) + 3 * np.arange(17)) % 64  # put your tokens here
data = st.DataLoader({"tokens": counting.astype("int32")}, global_batch_size=32)


def loss(model, batch):
    return st.cross_entropy(model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:])


model = st.lora(from_hf_config(source), rank=4, targets="blocks/**/kernel")
plan = st.plan(model, loss, optax.adam(2e-2), data.abstract_batch, "fsdp=4,tensor=2")
state = st.load_hf(source, plan)  # straight into the shards
result = st.fit(plan, data, num_steps=60, state=state)
out = st.export_hf(plan, result.state, "tuned", like=source)  # corrections added up
print(f"loss {result.history[0]['loss']:.2f} -> {result.history[-1]['loss']:.2f}")
print("wrote", *sorted(file.name for file in out.iterdir()))
