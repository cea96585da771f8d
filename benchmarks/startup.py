"""Where the time from the start of Python to the first finished step goes.

    python benchmarks/startup.py [--json FILE]

The phases of one process without and with compiled programs on disk, in wall and in CPU seconds
(the latter do not grow because another program runs), and three commands: `shardtrain --help`,
`import shardtrain`, and importing what trains.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import SMALL, TOY, environment, use_cores

COMMANDS = {
    "shardtrain --help": ["-m", "shardtrain", "--help"],
    "import shardtrain": ["-c", "import shardtrain"],
    "import jax, flax.nnx, optax": ["-c", "import jax, flax.nnx, optax"],
    "the same, and st.plan, st.fit, st.DataLoader": [
        "-c",
        "import jax, flax.nnx, optax, shardtrain as st; st.plan, st.fit, st.DataLoader",
    ],
}


class Phases:
    """Wall and CPU seconds since the last mark."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.last = time.perf_counter(), time.process_time()

    def mark(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        wall, cpu = (b - a for a, b in zip(self.last, now, strict=True))
        self.found[name] = {"seconds": wall, "cpu_seconds": cpu}
        self.last = now


def one_process(config: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Everything up to the second step, in this process."""
    phases = Phases()
    jax, nnx, optax = map(importlib.import_module, ("jax", "flax.nnx", "optax"))
    phases.mark("import jax, flax.nnx, optax")
    del nnx
    st = importlib.import_module("shardtrain")
    models = importlib.import_module("shardtrain.models")
    _ = st.plan
    phases.mark("import shardtrain, its models and plan")
    np = importlib.import_module("numpy")
    batch = {name: np.zeros((16, 128), "int32") for name in ("tokens", "targets")}
    loss = lambda model, batch: st.cross_entropy(model(batch["tokens"]), batch["targets"])
    make = lambda rngs: models.Decoder(models.DecoderConfig(**config), rngs=rngs)
    jax.devices()
    phases.mark("start JAX's backend")
    plan = st.plan(make, loss, optax.adamw(1e-3), batch, "data=-1")
    phases.mark("st.plan")
    state = jax.block_until_ready(plan.init(0))
    phases.mark("plan.init, compiled")
    plan.program_text()
    phases.mark("trace the step")
    state, metrics = plan.step(state, batch)
    jax.block_until_ready((state, metrics))
    phases.mark("compile the step, first step")
    jax.block_until_ready(plan.step(state, batch))
    phases.mark("second step")
    return phases.found


def seconds_of(arguments: list[str], repeats: int) -> float:
    """The fastest of some runs of Python."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = TOY if args.toy else SMALL
    if args.inside:
        print(json.dumps(one_process(config)))
        return
    found = environment(use_cores(None)) | {"config": config}
    found["commands"] = {k: seconds_of(v, args.repeats) for k, v in COMMANDS.items()}
    inside = [sys.executable, __file__, "--inside", *(["--toy"] if args.toy else [])]
    with tempfile.TemporaryDirectory() as cache:
        there = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": cache}
        for name in ("nothing on disk", "compiled programs on disk"):
            told = subprocess.run(inside, env=there, check=True, stdout=subprocess.PIPE, text=True)
            found[name] = json.loads(told.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
