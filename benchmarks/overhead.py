"""What `plan.step` costs over the same step written by hand in plain `jax.jit`.

    python benchmarks/overhead.py [--rounds 200] [--json FILE]

Both programs train the same model on the same mesh with the same shardings, return the same
metrics and skip non-finite steps; they run alternately in one process. Reported per device count:
the median ratio of step times, the extra host time per dispatch, and the counts of traces and
collectives, which must be equal.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import shardtrain as st
from shardtrain.planner.collectives import collectives_of

WIDTH, DEPTH, ROWS = 512, 6, 256


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])
        self.head = nnx.Linear(WIDTH, 16, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        return self.head(x)


def loss_fn(model: Any, batch: Any) -> st.Mean:
    return st.cross_entropy(model(batch["x"]), batch["y"], batch["mask"])


def make_batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(ROWS, WIDTH)).astype("float32"),
        "y": random.integers(0, 16, ROWS).astype("int32"),
        "mask": (random.random(ROWS) > 0.2).astype("float32"),
    }


class HandWritten:
    """The step as an experienced JAX user writes it, in the plan's shardings."""

    def __init__(self, mesh: Any, optimizer: optax.GradientTransformation):
        graphdef, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
        whole = NamedSharding(mesh, PartitionSpec())
        rows = NamedSharding(mesh, PartitionSpec("data"))
        state = {
            "params": nnx.to_pure_dict(params),
            "step": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
        }
        state["opt"] = optimizer.init(state["params"])
        self.state = jax.device_put(state, whole)
        self.batch_sharding = rows
        self.traces = 0

        def step(state: Any, batch: Any) -> Any:
            self.traces += 1

            def total(params: Any) -> Any:
                filled = nnx.State(params)
                mean = loss_fn(nnx.merge(graphdef, filled), batch)
                return mean.total, mean.weight

            (loss_sum, weight), grads = jax.value_and_grad(total, has_aux=True)(state["params"])
            grads = jax.tree.map(lambda g: g / weight, grads)
            loss, norm = loss_sum / weight, optax.global_norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            updates, opt = optimizer.update(grads, state["opt"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            new = {"params": params, "opt": opt}
            old = {"params": state["params"], "opt": state["opt"]}
            new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
            skipped = 1 - finite.astype(jnp.int32)
            counts = {"step": state["step"] + 1, "skipped": state["skipped"] + skipped}
            metrics = {"loss": loss, "grad_norm": norm, "weight": weight, "skipped": skipped}
            return {**new, **counts}, metrics

        self.step = jax.jit(
            step, in_shardings=(whole, rows), out_shardings=(whole, whole), donate_argnums=0
        )


def measure(num_devices: int, rounds: int) -> dict[str, Any]:
    devices = jax.devices()[:num_devices]
    optimizer = optax.adamw(1e-3)
    batch = make_batch()
    plan = st.plan(Network, loss_fn, optimizer, batch, st.Strategy(data=-1), devices=devices)
    state = plan.init(0)
    hand = HandWritten(plan.mesh, optimizer)
    placed = plan.place(batch)
    hand_state = hand.state
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (hand_state, placed)
    )
    hand_collectives = collectives_of(hand.step.lower(*abstract).compile(), plan.mesh)
    times: dict[str, list[tuple[float, float]]] = {"plan": [], "hand": []}

    def timed(name: str) -> None:
        nonlocal state, hand_state, metrics, hand_metrics
        start = time.perf_counter()
        if name == "plan":
            state, metrics = plan.step(state, placed)
            made = state.params, state.opt_state, metrics
        else:
            hand_state, hand_metrics = hand.step(hand_state, placed)
            made = hand_state, hand_metrics
        dispatched = time.perf_counter()
        jax.block_until_ready(made)
        times[name].append((dispatched - start, time.perf_counter() - start))

    metrics, hand_metrics = {}, {}
    for i in range(rounds + 20):
        # Who goes first alternates too: the second finds warmer caches.
        for name in ("plan", "hand") if i % 2 else ("hand", "plan"):
            timed(name)
    ours, theirs = ([t[1] for t in times[n][20:]] for n in ("plan", "hand"))
    dispatch = [a[0] - b[0] for a, b in zip(times["plan"][20:], times["hand"][20:], strict=True)]
    count = lambda found: sum(c.count for c in found)
    size = lambda found: sum(c.count * c.bytes for c in found)
    return {
        "devices": num_devices,
        "step_ms": 1e3 * statistics.median(ours),
        "hand_written_ms": 1e3 * statistics.median(theirs),
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "paired_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "extra_dispatch_us": 1e6 * statistics.median(dispatch),
        "traces": [plan.trace_counts["step"], hand.traces],
        "collectives": [count(plan.collectives()), count(hand_collectives)],
        "collective_bytes": [size(plan.collectives()), size(hand_collectives)],
        "loss": [float(metrics["loss"]), float(hand_metrics["loss"])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    st.simulate(8)
    results = [measure(n, arguments.rounds) for n in (1, 8)]
    for r in results:
        print(
            f"{r['devices']} device(s): {r['step_ms']:.2f} ms over {r['hand_written_ms']:.2f} ms "
            f"by hand = {r['ratio']:.3f} (pairwise {r['paired_ratio']:.3f}); dispatch "
            f"+{r['extra_dispatch_us']:.0f} us; traces {r['traces']}, collectives "
            f"{r['collectives']}, bytes {r['collective_bytes']}"
        )
    if arguments.json:
        environment = {"jax": jax.__version__, "python": platform.python_version()}
        arguments.json.write_text(json.dumps({**environment, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
