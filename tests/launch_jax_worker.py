"""A real worker: joins, jits a tiny psum over all processes, steps until told otherwise.

`launch_jax_worker.py SCRATCH behaviour@process ...`, one behaviour per generation.
"""

import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.launch import init_distributed
from shardtrain.monitoring import (
    Preempted,
    Preemption,
    Progress,
    check_agreement,
    find_stragglers,
    fingerprint,
    gather_step_times,
)

scratch = pathlib.Path(sys.argv[1])
layout = init_distributed(timeout=60)
init_distributed()  # a second call changes nothing
run = pathlib.Path(os.environ["SHARDTRAIN_RUN_DIRECTORY"])
number = int(run.name.split("-")[1])
behaviours = sys.argv[2:] or ["none@0"]
behaviour, _, who = behaviours[min(number, len(behaviours) - 1)].partition("@")
index = jax.process_index()
mine = str(index) == who
(scratch / f"pid-{os.getpid()}").touch()
steps = {"preempt": 10**9, "slow": 8}.get(behaviour, 4)

progress = Progress.from_environment()
mesh = Mesh(np.array(jax.devices()), ("data",))
rows = NamedSharding(mesh, P("data"))
local = np.ones((len(jax.devices()), 2), np.float32)
total = jax.jit(lambda x: jnp.sum(x) + 0 * x[0, 0], out_shardings=NamedSharding(mesh, P()))

program = fingerprint(total.lower(jax.ShapeDtypeStruct(local.shape, local.dtype)).as_text())
check_agreement(
    {"program": program, "config": f"lr={2 if behaviour == 'disagree' and mine else 1}"}
)
with Preemption() as preemption:
    for step in range(steps):
        progress.phase("data", step)
        if step == 2 and mine:
            if behaviour == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if behaviour == "sleep":
                time.sleep(600)
            if behaviour == "raise":
                raise ValueError(f"boom on process {index}")
            if behaviour == "preempt":
                (scratch / "ready").touch()
        if behaviour == "slow" and mine:
            time.sleep(0.2)
        x = jax.make_array_from_callback(local.shape, rows, lambda i: local[i])
        progress.phase("dispatch" if step else "first_step", step)
        result = total(x)
        progress.phase("wait", step)
        assert float(result) == 2.0 * len(jax.devices())
        if preemption.should_stop(step):
            (scratch / f"saved-{index}").write_text(str(step))
            raise Preempted(step)
progress.phase("done")
for straggler in find_stragglers(gather_step_times(progress.step_times())):
    print(straggler)
print(f"result {float(result)} on {jax.device_count()} devices, layout: {layout}")
