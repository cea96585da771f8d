"""What five reference programs compile to, kept in a file: a slow-down shows in review.

Counts are exact: collectives and their bytes by kind and axes, traces, instructions by class,
temporary bytes. `SHARDTRAIN_SNAPSHOT=write pytest tests/test_snapshot.py` writes the file anew, and
the change is reviewed like any other. Another JAX than the file's fuses and combines otherwise;
there traces and which axes communicate are held.
"""

import collections
import json
import os
from pathlib import Path

import jax
import optax
import pytest
from zoo import ZOO

import shardtrain as st
from shardtrain.planner.hlo import parse_hlo

FILE = Path(__file__).parent / "data" / "snapshots.json"
WRITE = os.environ.get("SHARDTRAIN_SNAPSHOT") == "write"

PROGRAMS = {
    "data parallel, dropout": ("gpt-targets", "data=8,num_microbatches=2"),
    "fsdp, bf16, scanned": ("scan-nnx-targets", "fsdp=8,precision=bf16"),
    "tensor and sequence parallel": ("llama-targets", "data=4,tensor=2,sequence_parallel=True"),
    "1f1b pipeline": ("llama-targets", "data=2,tensor=2,pipeline=2,num_microbatches=4"),
    "experts": ("moe-targets", "data=4,expert=2"),
}
CLASSES = ("dot", "while", "conditional", "fusion", "copy", "transpose", "scatter", "sort")


def measured(name):
    family, strategy = PROGRAMS[name]
    case = ZOO[family]
    batch = case.batch(16, 0)
    plan = st.plan(case.make(), case.loss, optax.adam(1e-2), batch, strategy)
    state = plan.init()
    for _ in range(3):
        state, _ = plan.step(state, batch)
    compiled = plan.compile()
    sent = collections.Counter()
    for c in plan.collectives():
        key = f"{c.kind} over {'+'.join(c.axes)}"
        sent[f"{key}, times"] += c.count
        sent[f"{key}, bytes"] += c.count * c.bytes
    opcodes = collections.Counter(
        i.opcode for c in parse_hlo(compiled.hlo).computations.values() for i in c.instructions
    )
    return {
        "traces": plan.trace_counts["step"],
        "flops": compiled.flops,
        "temp_bytes": compiled.temp_bytes,
        "sent": dict(sorted(sent.items())),
        "instructions": {k: opcodes[k] for k in CLASSES if opcodes[k]},
    }


@pytest.mark.parametrize("name", PROGRAMS)
def test_reference_program_compiles_to_the_same(devices, name):
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = measured(name)
    if WRITE:
        FILE.write_text(json.dumps({**kept, "jax": jax.__version__, name: found}, indent=1) + "\n")
        return
    wanted = kept[name]
    assert found["traces"] == wanted["traces"] == 1
    if jax.__version__ == kept["jax"]:
        assert found == wanted
    axes = lambda counts: {key.split(",")[0].split(" over ")[1] for key in counts["sent"]}
    assert axes(found) == axes(wanted)
