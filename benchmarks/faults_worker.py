"""The run that `faults.py` damages: two processes, a tiny model, faults at named places.

`faults_worker.py DIRECTORY`, with `DIRECTORY/schedule.json`: one list of faults per generation.
A fault: {"kind", "process", "phase", "step", "delay"}; it strikes when that process enters that
phase at that step (or later), after `delay` seconds.
"""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import threading
import time

T0 = time.time()
DIRECTORY = pathlib.Path(sys.argv[1])
RUN = pathlib.Path(os.environ["SHARDTRAIN_RUN_DIRECTORY"])
GENERATION = int(RUN.name.split("-")[1])
PROCESS = int(os.environ["SHARDTRAIN_PROCESS_INDEX"])


def log(kind, **fields):
    record = {"time": time.time(), "kind": kind, "generation": GENERATION, "process": PROCESS}
    with (DIRECTORY / "timeline.jsonl").open("a") as file:
        file.write(json.dumps({**record, **fields}) + "\n")


def damage_newest_checkpoint(how, seed):
    """Flip one bit of, cut, or delete one file of the newest step."""
    steps = [p for p in (DIRECTORY / "run").iterdir() if p.name.isdigit() and p.is_dir()]
    if len(steps) < 2:  # the only checkpoint: the claim is about falling back to an older one
        return None
    newest = max(steps, key=lambda p: int(p.name))
    draw = random.Random(seed)
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    victim = draw.choice(files)
    if how == "delete":
        victim.unlink()
    elif how == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        content = bytearray(victim.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        victim.write_bytes(content)
    return str(victim.relative_to(DIRECTORY))


def lose_memory():
    """Delete this process's snapshots, as when its host goes down; None where there are none."""
    folder = _folder(DIRECTORY / "run") / f"process-{PROCESS}"
    if not folder.exists():
        return None
    shutil.rmtree(folder)
    return folder.name


def strike(fault, phase, step):
    kind = fault["kind"]
    log("fault", fault=fault, phase=phase, step=step)
    if kind in ("flip", "truncate", "delete"):
        log("damaged", file=damage_newest_checkpoint(kind, fault["seed"]))
    if kind == "lost host":
        log("lost", folder=lose_memory())
    if kind == "nan":
        Loader.spoil_next = True
    if kind in ("kill", "flip", "truncate", "delete", "lost host"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "raise":
        raise ValueError("injected")
    if kind == "sleep":
        time.sleep(3600)
    if kind == "slow":
        time.sleep(0.3)
    if kind == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))


def faults_now(phase, step):
    for fault in list(FAULTS):
        if fault["process"] != PROCESS or fault["phase"] != phase:
            continue
        if fault["step"] is not None and (step is None or step < fault["step"]):
            continue
        if fault["kind"] != "slow":
            FAULTS.remove(fault)
        if fault["delay"]:
            threading.Timer(fault["delay"], strike, (fault, phase, step)).start()
        else:
            strike(fault, phase, step)


schedule = json.loads((DIRECTORY / "schedule.json").read_text())
FAULTS = schedule[GENERATION] if len(schedule) > GENERATION else []
faults_now("import", None)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import shardtrain as st  # noqa: E402
from shardtrain.checkpoint import as_text, fingerprint  # noqa: E402
from shardtrain.checkpoint.leaves import named_leaves  # noqa: E402
from shardtrain.monitoring import Progress  # noqa: E402
from shardtrain.recovery.saved import _folder  # noqa: E402

report_phase = Progress.phase


def phase_with_faults(self, name, step=None):
    before = self.record.phase
    report_phase(self, name, step)
    if before == "wait" and not phase_with_faults.recovered:
        phase_with_faults.recovered = True
        log("first step done")
    faults_now(name, self.record.step)


phase_with_faults.recovered = False
Progress.phase = phase_with_faults
st.init_distributed(timeout=60)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(16, 32, rngs=rngs)
        self.outer = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


class Losses:
    def on_step(self, step, values):
        log("step", step=step, loss=float(values["loss"]).hex())


class Loader(st.DataLoader):
    """Spoils the rows of this process in the next batch, once."""

    spoil_next = False

    def batch(self, step, sharding=None):
        batch = super().batch(step, sharding)
        if not Loader.spoil_next:
            return batch
        Loader.spoil_next = False
        x = batch["x"]
        spoilt = [jax.device_put(s.data * np.nan, s.device) for s in x.addressable_shards]
        return batch | {"x": jax.make_array_from_single_device_arrays(x.shape, x.sharding, spoilt)}


draw = np.random.default_rng(0)
source = {
    "x": draw.normal(size=(96, 16)).astype(np.float32),
    "y": draw.integers(0, 4, size=96).astype(np.int32),
}
loader = Loader(source, 8, seed=3)
plan = st.plan(
    lambda rngs: Model(rngs),
    lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"]),
    optax.adamw(1e-2),
    loader.abstract_batch,
    st.Strategy(data=2, fsdp=2),
)
options = json.loads((DIRECTORY / "options.json").read_text())
result = st.fit(
    plan,
    loader,
    options["num_steps"],
    DIRECTORY / "run",
    callbacks=[Losses()],
    save_every=options["save_every"],
    snapshot_every=options["snapshot_every"],
    skip_steps=options["skip_steps"],
    progress=False,
)
state = as_text(fingerprint(named_leaves(result.state)))
if jax.process_index() == 0:
    (DIRECTORY / "final.json").write_text(json.dumps(state))
log("done", seconds=time.time() - T0)
