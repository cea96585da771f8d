"""One of two processes: loads a checkpoint over both, says what it read, and exports it again."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from hf_models import MAPPING, make_plan

import shardtrain as st
from shardtrain.hf.pieces import Pieces

st.init_distributed()
root, read = Path(sys.argv[1]), []
whole = Pieces.read


def counted(self, index, dtype):
    found = whole(self, index, dtype)
    read.append(found.nbytes)
    return found


Pieces.read = counted
plan = make_plan(sys.argv[2])
state = st.load_hf(root / "source", plan, MAPPING)
st.export_hf(plan, state, root / "out", root / "source", MAPPING)
held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(state.params)
    for shard in leaf.addressable_shards
    if shard.replica_id == 0
)
total = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
report = {"read": sum(read), "largest": max(read), "held": held, "total": total}
sums = {k: float(np.sum(x)) for k, x in {"step": np.asarray(state.step)}.items()}
print("REPORT " + json.dumps(report | sums), flush=True)
