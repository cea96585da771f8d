"""One of two processes, two devices each: three steps, then what this process saw, as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardtrain as st

index, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)


def init(key):
    return {"w": jax.random.normal(key, (8, 4)), "b": jnp.zeros((4,))}


def loss(variables, batch):
    error = (jnp.tanh(batch["x"] @ variables["w"] + variables["b"]) - 1.0).sum(-1) ** 2
    return st.Mean(jnp.sum(error * batch["mask"]), jnp.sum(batch["mask"]))


batch = {
    "x": np.linspace(-1, 1, 16 * 8, dtype=np.float32).reshape(16, 8),
    "mask": (np.arange(16) < 11).astype(np.float32),
}
strategy = st.Strategy(data=2, fsdp=2, num_microbatches=2, dcn={"data": 2})
plan = st.plan(st.Functional(init=init), loss, optax.adam(0.1), batch, strategy)
state, losses = plan.init(0), []
for _ in range(3):
    state, metrics = plan.step(state, batch)
    losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
evaluated = float(plan.eval_step(state, batch)["loss"])
refused = ""
try:
    plan.place({**batch, "x": batch["x"][:8]})
except st.errors.BatchError as error:
    refused = str(error)
report = {
    "hosts": [d.process_index for d in plan.mesh.devices.flat],
    "losses": losses,
    "evaluated": evaluated,
    "held": [list(s.data.shape) for s in state.params["w"].addressable_shards],
    "traces": plan.trace_counts["step"],
    "refused": refused,
}
print("REPORT " + json.dumps(report), flush=True)
