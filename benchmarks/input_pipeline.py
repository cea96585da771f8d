"""How long `st.fit` waits for data when a step takes a tenth of what it takes on this CPU.

    python benchmarks/input_pipeline.py [--json FILE]

The compiled step is timed first, then replaced by a device that is busy for a tenth of that time:
the host returns at once and metrics are there when the time is over, as with an accelerator. All
else is real: shuffled examples from a `DataLoader`, its thread that reads ahead, placing them on 8
devices, `st.fit` and its metrics. Reported per kind of source: the share of the run spent waiting
in `loader.batch`, and how much longer the run took than its steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from peers import SMALL, TOY, environment, use_cores

import shardtrain as st
from shardtrain.data.tokens import TokenDataset
from shardtrain.models import Decoder, DecoderConfig


class Later:
    """A metric that the device has ready at some time; reading it earlier waits."""

    def __init__(self, value: float, ready: float):
        self.value, self.ready = value, ready

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return np.asarray(self.value, dtype)


class Device:
    """Does one step after another, each in the same time, while the host goes on."""

    def __init__(self, seconds: float):
        self.seconds, self.free = seconds, 0.0

    def step(self, state: Any, batch: Any) -> Any:
        """What `plan.step` gives; a step begins when its batch is there."""
        jax.block_until_ready(batch)
        self.free = max(self.free, time.perf_counter()) + self.seconds
        values = {"loss": 1.0, "grad_norm": 1.0, "weight": 1.0, "skipped": 0.0}
        return state, {name: Later(value, self.free) for name, value in values.items()}


def loss_fn(model: Any, batch: Any) -> st.Mean:
    return st.cross_entropy(model(batch["tokens"]), batch["targets"], batch["mask"])


def sources(sequence: int, rows: int) -> dict[str, Callable[[], st.DataLoader]]:
    """Kinds of data: whole columns, windows of a token stream, and Python per example."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, 2000 * sequence + 1, dtype=np.int32)
    windows = TokenDataset(tokens, sequence)
    columns = {k: np.stack([w[k] for w in map(windows.__getitem__, range(2000))])
               for k in ("tokens", "targets", "mask")}  # fmt: skip

    def noisy(example: Any, rng: np.random.Generator) -> Any:
        kept = rng.random(sequence) > 0.1
        return {**example, "tokens": np.where(kept, example["tokens"], 0).astype(np.int32)}

    return {
        "columns": lambda: st.DataLoader(columns, rows),
        "windows of a token stream": lambda: st.DataLoader(windows, rows),
        "windows, changed at random": lambda: st.DataLoader(windows, rows, transform=noisy),
    }


def step_seconds(plan: Any, batch: Any, steps: int = 5) -> float:
    """Median time of the real step."""
    state, times = plan.init(0), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = plan.step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Clock:
    """A callback: when each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, step: int, metrics: Any) -> None:
        self.times.append(time.perf_counter())


def measure(make_plan: Any, loader: st.DataLoader, seconds: float, steps: int) -> dict[str, float]:
    """Train with a device that takes `seconds` per step; the first ten steps do not count."""
    plan, clock = make_plan(loader), Clock()
    state = plan.init(0)
    plan.step = Device(seconds).step
    options: dict[str, Any] = {"progress": False, "check_replicas_every": None, "guard": None}
    result = st.fit(plan, loader, steps + 10, callbacks=[clock], state=state, **options)
    waited = sum(h["data_seconds"] for h in result.history[10:])
    took = clock.times[-1] - clock.times[9]
    return {
        "data_wait_share": waited / took,
        "data_wait_ms": 1e3 * waited / steps,
        "longer_than_steps": took / (steps * seconds) - 1,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--speed-up", type=float, default=10.0, help="of the device over this CPU")
    parser.add_argument("--toy", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    cores = use_cores(None)
    devices = st.simulate(8)
    rows, sequence = (8, 32) if args.toy else (16, 128)
    config = DecoderConfig(**(TOY if args.toy else SMALL))

    def make_plan(loader: st.DataLoader) -> Any:
        model = lambda rngs: Decoder(config, rngs=rngs)
        batch = loader.abstract_batch
        return st.plan(model, loss_fn, optax.adamw(1e-3), batch, "data=8", devices=devices)

    kinds = {name: make() for name, make in sources(sequence, rows).items()}
    first = kinds["columns"]
    real = step_seconds(make_plan(first), first.batch(0))
    found = environment(cores) | {"step_seconds_here": real, "speed_up": args.speed_up}
    found["step_seconds"] = real / args.speed_up
    found["sources"] = {
        name: measure(make_plan, loader, found["step_seconds"], args.steps)
        for name, loader in kinds.items()
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
