"""What a checkpoint costs, against the bare copy, the raw file and plain Orbax, in one run.

    python benchmarks/checkpoint.py --megabytes 256 --repeats 5 --json out.json

Measured, as medians over repeats that alternate between the contestants:

* blocking: how long `save` holds up training, over a bare device-to-host copy of the same shards;
* committed: from the call to a verified step on disk, over writing and syncing one raw file;
* restore: to device arrays on the same shardings, over reading one raw file (both from the page
  cache: dropping it needs root) and with the verification that plain Orbax does not do;
* slowdown: time of a training-like step while a save is in flight, over one without;
* peak memory: extra resident memory during a save, over the size of the state.

`first_save_s` is the very first save, which also compiles the fingerprint.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table

from shardtrain.checkpoint import Checkpointer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Parameters and two moments, as Adam has."""

    step: Any
    params: Any
    mu: Any
    nu: Any


class Plan:
    def __init__(self, state: State):
        self.abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )

    def describe(self) -> dict[str, str]:
        return {"model": "benchmark"}


def make_state(megabytes: int, mesh: Mesh) -> State:
    """Random float32 (weights hardly compress), fully sharded, about `megabytes` in all."""
    width, layers = 1024, max(1, megabytes // (3 * 8 * 4))  # a layer: 4 + 4 MB, three times
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))

    def tree(seed: int) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(seed), (layers, 2))
        return {
            f"layer_{i}": {
                "in": jax.device_put(jax.random.normal(keys[i, 0], (width, 4 * width)), sharded),
                "out": jax.device_put(jax.random.normal(keys[i, 1], (4 * width, width)), sharded),
            }
            for i in range(layers)
        }

    step = jax.device_put(np.int32(0), NamedSharding(mesh, PartitionSpec()))
    return State(step, tree(0), tree(1), tree(2))


def at_step(state: State, step: int) -> State:
    placed = jax.device_put(np.int32(step), state.step.sharding)
    return dataclasses.replace(state, step=placed)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def copy_to_host(state: State) -> list[np.ndarray]:
    """The least any checkpoint must do before training may go on."""
    shards = [s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards]
    return [np.array(s.data, copy=True) for s in shards if s.replica_id == 0]


def write_raw(path: Path, arrays: list[np.ndarray]) -> None:
    with path.open("wb") as file:
        for array in arrays:
            file.write(array.data if array.ndim else array.tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_raw(path: Path) -> bytes:
    return path.read_bytes()


class PeakMemory:
    """Extra resident bytes while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self._process, self._stop = psutil.Process(), threading.Event()
        self._before = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = self.peak - self._before


def measure_raw(state: State, root: Path) -> dict[str, float]:
    copied, arrays = timed(lambda: copy_to_host(state))
    written, _ = timed(lambda: write_raw(root / "raw", arrays))
    read, _ = timed(lambda: read_raw(root / "raw"))
    (root / "raw").unlink()
    return {"blocking": copied, "committed": written, "restore": read}


def measure_shardtrain(state: State, root: Path, step: int) -> dict[str, float]:
    saved = at_step(state, step)
    with Checkpointer(root / "ours", Plan(state), max_to_keep=1) as checkpointer:
        with PeakMemory() as memory:
            started = time.perf_counter()
            checkpointer.save(saved)
            blocking = time.perf_counter() - started
            checkpointer.wait()
            committed = time.perf_counter() - started
        restored, tree = timed(lambda: jax.block_until_ready(checkpointer.restore()))
    assert int(tree.step) == step
    return {
        "blocking": blocking, "committed": committed, "restore": restored, "peak": memory.extra
    }  # fmt: skip


def measure_orbax(
    state: State, root: Path, step: int, compression: bool = True
) -> dict[str, float]:
    """Orbax as it comes, or without compression as shardtrain uses it."""
    tree = {"step": at_step(state, step).step, "params": state.params, "opt": [state.mu, state.nu]}
    abstract = jax.tree.map(ocp_abstract, tree)
    path = str(root / f"orbax-{step}")
    context = ocp.Context()
    context.array.saving.use_compression = compression
    with context:
        with PeakMemory() as memory:
            started = time.perf_counter()
            response = ocp.save_async(path, tree)
            blocking = time.perf_counter() - started
            response.result()
            committed = time.perf_counter() - started
        restored, _ = timed(lambda: jax.block_until_ready(ocp.load(path, abstract)))
    shutil.rmtree(path)
    return {
        "blocking": blocking, "committed": committed, "restore": restored, "peak": memory.extra
    }  # fmt: skip


def ocp_abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def measure_slowdown(state: State, mesh: Mesh, root: Path) -> dict[str, float]:
    """Steps of matrix products, counted while a save is in flight and while none is."""
    x = jax.device_put(jnp.ones((512, 512)), NamedSharding(mesh, PartitionSpec("fsdp")))
    step = jax.jit(lambda x: jnp.tanh(x @ x.T @ x) * 0.01, out_shardings=x.sharding)
    step(x).block_until_ready()

    def steps_until(done: Callable[[], bool], least: int) -> list[float]:
        times: list[float] = []
        while len(times) < least or not done():
            times.append(timed(lambda: step(x).block_until_ready())[0])
        return times

    idle = steps_until(lambda: True, 50)
    busy: list[float] = []
    with Checkpointer(root / "slowdown", Plan(state), max_to_keep=1) as checkpointer:
        for number in (1, 2, 3):
            checkpointer.save(at_step(state, number))
            busy += steps_until(lambda: not checkpointer.in_flight(), 1)
            checkpointer.wait()
    return {"idle": statistics.median(idle), "busy": statistics.median(busy), "steps": len(busy)}


def median_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def run(megabytes: int, repeats: int, root: Path) -> dict[str, Any]:
    load = os.getloadavg()[0]
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    state = jax.block_until_ready(make_state(megabytes, mesh))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    first = measure_shardtrain(state, root, 1)["blocking"]
    rows: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        step = repeat + 2
        rows.setdefault("raw", []).append(measure_raw(state, root))
        rows.setdefault("shardtrain", []).append(measure_shardtrain(state, root, step))
        rows.setdefault("orbax", []).append(measure_orbax(state, root, 2 * step))
        rows.setdefault("orbax uncompressed", []).append(
            measure_orbax(state, root, 2 * step + 1, compression=False)
        )
    slowdown = measure_slowdown(state, mesh, root)
    return {
        "jax": jax.__version__,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "load_average": [load, os.getloadavg()[0]],  # what else ran here: before and after
        "state_bytes": size,
        "repeats": repeats,
        "first_save_s": first,
        "median_s": {name: median_of(values) for name, values in rows.items()},
        "slowdown": slowdown | {"ratio": slowdown["busy"] / slowdown["idle"]},
    }


def show(result: dict[str, Any]) -> None:
    size, medians = result["state_bytes"], result["median_s"]
    title = f"{size / 1e6:.0f} MB on {result['device']}, medians of {result['repeats']}"
    table = Table("", "blocking", "committed", "restore", "peak memory / state", title=title)
    raw = medians["raw"]
    for name, row in medians.items():
        cells = [f"{row[k]:.3f} s ({row[k] / raw[k]:.2f}x)" for k in raw]
        peak = f"{row['peak'] / size:.2f}" if "peak" in row else ""
        table.add_row(name, *cells, peak)
    console = Console()
    console.print(table)
    slow = result["slowdown"]
    console.print(
        f"raw: copy to host, write + fsync, read. First save: {result['first_save_s']:.2f} s "
        f"blocking. Step while saving: {slow['ratio']:.2f}x of {slow['idle'] * 1e3:.1f} ms idle."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=8, help="virtual devices on CPU")
    parser.add_argument("--directory", type=Path, default=None, help="where to write; default tmp")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
        result = run(arguments.megabytes, arguments.repeats, Path(root))
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
