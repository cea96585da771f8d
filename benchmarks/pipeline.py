"""Pipeline schedules against no pipeline and against a plain GPipe, on virtual CPU devices.

    python benchmarks/pipeline.py --out pipeline.png

Measures, for one gradient of a small residual MLP stack:

- step time of every schedule, of the same model unpipelined on the same devices (batch over all of
  them), and of a GPipe as one writes it by hand: `vmap` over stages, a shift per tick, `jax.grad`
  through the loop;
- the same times over ticks x the measured cost of a tick;
- temporary memory against the number of microbatches, from the compiler;
- compile time.

All times are of one machine in one run; only their ratios say something. Virtual devices share the
machine's cores, so an idle stage costs nothing here and bubbles do not show as time.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardtrain.modules import Functional, cross_entropy, model_form, standardize
from shardtrain.modules.intercept import Calls
from shardtrain.pipeline import make_pipeline, make_pipeline_grad, make_schedule, to_stage_major
from shardtrain.train import over_microbatches, value_and_grad

STAGES, DATA = 4, 2
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1))


@dataclasses.dataclass(frozen=True)
class Sizes:
    layers: int = 8
    width: int = 128
    length: int = 64
    vocab: int = 256
    rows: int = 8  # of one microbatch


def init(sizes: Sizes, key: jax.Array) -> dict:
    keys = jax.random.split(key, 4)
    normal = lambda k, *shape: jax.random.normal(k, shape) * shape[-2] ** -0.5
    return {
        "embed": normal(keys[0], sizes.vocab, sizes.width),
        "up": normal(keys[1], sizes.layers, sizes.width, 4 * sizes.width),
        "down": normal(keys[2], sizes.layers, 4 * sizes.width, sizes.width),
        "head": normal(keys[3], sizes.width, sizes.vocab),
    }


def layer(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return x + jax.nn.gelu(x @ up) @ down


def loss(params: dict, batch: dict) -> Any:
    x = params["embed"][batch["x"]]
    body = lambda x, w: (layer(x, *w), None)
    x, _ = jax.lax.scan(body, x, (params["up"], params["down"]))
    return cross_entropy(x @ params["head"], batch["y"])


def make_batch(sizes: Sizes, rows: int) -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, sizes.vocab, (rows, sizes.length + 1)).astype(np.int32)
    return {"x": jnp.asarray(tokens[:, :-1]), "y": jnp.asarray(tokens[:, 1:])}


def make_mesh(stages: int, data: int) -> Mesh:
    devices = np.array(jax.devices()[: stages * data]).reshape(data, 1, stages)
    return Mesh(devices, ("data", "fsdp", "pipeline"), axis_types=(AxisType.Auto,) * 3)


def by_hand(sizes: Sizes, mesh: Mesh, microbatches: int) -> Callable[..., Any]:
    """GPipe by autodiff: a register of stages that shifts every tick."""

    def total(params: dict, batch: dict) -> jax.Array:
        split = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
        x, y = split(batch["x"]), split(batch["y"])
        stacked = lambda w: w.reshape(STAGES, -1, *w.shape[1:])
        place = lambda x: jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, PartitionSpec("pipeline", "data"))
        )
        weights = stacked(params["up"]), stacked(params["down"])

        @jax.checkpoint
        def stage(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, w: (layer(x, *w), None), x, (up, down))[0]

        def tick(register: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            tokens = jax.lax.dynamic_index_in_dim(
                x, jnp.minimum(t, microbatches - 1), keepdims=False
            )
            register = place(jnp.roll(register, 1, axis=0).at[0].set(params["embed"][tokens]))
            register = place(jax.vmap(stage)(register, *weights))
            return register, register[-1]

        register = jnp.zeros((STAGES, sizes.rows, sizes.length, sizes.width))
        _, out = jax.lax.scan(tick, register, jnp.arange(microbatches + STAGES - 1))
        return cross_entropy(out[STAGES - 1 :] @ params["head"], y).total

    return jax.value_and_grad(total)


def cases(sizes: Sizes, microbatches: int) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Name -> (gradient function, its arguments on their devices)."""
    batch, key = make_batch(sizes, sizes.rows * microbatches), jax.random.key(1)
    form = model_form(Functional(lambda key: init(sizes, key)), loss, batch)
    params, variables = form.init(jax.random.key(0))

    def make_loss(user_loss: Callable[..., Any]) -> Callable[..., Any]:
        def pure(params: Any, variables: Any, batch: Any, key: jax.Array) -> Any:
            out, new = form.apply(user_loss, params, variables, key, True, (batch,), Calls())
            return standardize(out, microbatches, False)[0], new

        return pure

    mesh, flat = make_mesh(STAGES, DATA), make_mesh(1, STAGES * DATA)
    put = lambda tree, mesh, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    single = over_microbatches(value_and_grad(make_loss(loss)), microbatches, lambda grads: grads)
    found = {
        "no pipeline": (single, (put(params, flat, whole), {}, put(batch, flat, rows), key)),
    }
    stage_spec = {k: PartitionSpec("pipeline") if k in ("up", "down") else whole for k in params}
    by_stage = {k: put(x, mesh, stage_spec[k]) for k, x in params.items()}
    placed = put(batch, mesh, rows)
    found["gpipe by hand"] = (by_hand(sizes, mesh, microbatches), (by_stage, placed))
    for name, virtual in SCHEDULES:
        schedule = make_schedule(name, STAGES, microbatches, virtual)
        pipeline = make_pipeline(form, make_loss, loss, batch, schedule)
        grad = make_pipeline_grad(pipeline.model, schedule, mesh, pipeline.params)
        major = to_stage_major(params, pipeline.params)
        major = dataclasses.replace(
            major,
            outer=put(major.outer, mesh, whole),
            blocks=put(major.blocks, mesh, PartitionSpec("pipeline")),
        )
        state = to_stage_major(variables, pipeline.variables)
        found[name] = (grad, (major, state, placed, key))
    return found


@dataclasses.dataclass
class Row:
    """One case: seconds per step (alternating with all others), compiler's memory, compile time."""

    name: str
    microbatches: int
    ticks: int  # in which a stage does a forward: as many as have a backward
    temp_bytes: int
    compile_seconds: float
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")


def compiled(name: str, microbatches: int, fn: Any, args: tuple) -> tuple[Row, Callable[[], Any]]:
    start = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    temp = program.memory_analysis().temp_size_in_bytes
    row = Row(name, microbatches, num_ticks(name, microbatches), temp, compile_seconds)
    return row, lambda: jax.block_until_ready(program(*args))


def num_ticks(name: str, microbatches: int) -> int:
    """Ticks with a forward slot; without a table, microbatches."""
    virtual = dict(SCHEDULES).get(name)
    if virtual is None:
        return microbatches
    phases = make_schedule(name, STAGES, microbatches, virtual).table.phases
    return sum(phase.stop - phase.start for phase in phases if "F" in phase.slots)


def measure(rows: list[tuple[Row, Callable[[], Any]]], repeats: int) -> None:
    """One step of every case in turn, `repeats` times over, after one that does not count."""
    for n in range(repeats + 1):
        for row, step in rows:
            start = time.perf_counter()
            step()
            if n:
                row.times.append(time.perf_counter() - start)


def against_slots(rows: list[Row]) -> dict[str, float]:
    """Step time over ticks x slot cost: 1 means that nothing but the table's slots takes time.

    The cost of a tick is what one more costs: the difference between two numbers of microbatches.
    """
    found = {}
    for name, _ in SCHEDULES:
        few, many = [row for row in rows if row.name == name and row.times][:2]
        slot = (many.seconds - few.seconds) / (many.ticks - few.ticks)
        found[name] = few.seconds / (few.ticks * slot)
    return found


def check(found: dict[str, tuple[Callable[..., Any], tuple]]) -> None:
    """Every case computes the same loss, else its time means nothing."""
    totals = {}
    for name, (fn, args) in found.items():
        out = jax.jit(fn)(*args)
        totals[name] = float(out[0] if isinstance(out, tuple) else out.output.loss.total)
    spread = max(totals.values()) - min(totals.values())
    if spread > 1e-4 * abs(totals["no pipeline"]):
        raise SystemExit(f"the cases compute different losses: {totals}")


def draw(rows: list[Row], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    memory, bars = figure.subplots(1, 2)
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name]
        memory.plot(
            [row.microbatches for row in mine],
            [row.temp_bytes / 2**20 for row in mine],
            marker="o",
            label=name,
        )
    memory.set(xscale="log", yscale="log", xlabel="microbatches", ylabel="temp MiB per device")
    counts = sorted({row.microbatches for row in rows})
    memory.set_xticks(counts, counts)
    memory.set_yticks([5, 10, 20, 50], [5, 10, 20, 50])
    memory.minorticks_off()
    memory.legend(fontsize=7)
    timed = [row for row in rows if row.times and row.microbatches == rows[0].microbatches]
    base = next(row.seconds for row in timed if row.name == "no pipeline")
    bars.barh([row.name for row in timed], [row.seconds / base for row in timed])
    bars.set_xlabel("step time / no pipeline, shared cores")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="pipeline.png", help="where the picture goes")
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps per case")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 64])
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", STAGES * DATA)
    rows, timed = [], []
    for count in args.microbatches:
        found = cases(Sizes(), count)
        if count == args.microbatches[0]:
            check(found)
        made = [compiled(name, count, fn, values) for name, (fn, values) in found.items()]
        rows += [row for row, _ in made]
        timed += made if count in args.microbatches[:2] else []
    measure(timed, args.repeats)
    for row in rows:
        print(
            f"{row.name:14} M={row.microbatches:3}  step {row.seconds * 1e3:8.1f} ms  "
            f"temp {row.temp_bytes / 2**20:8.2f} MiB  compile {row.compile_seconds:5.1f} s"
        )
    base = {row.microbatches: row.seconds for row in rows if row.name == "no pipeline"}
    ratios = {
        f"{row.name}, {row.microbatches} microbatches": row.seconds / base[row.microbatches]
        for row in rows
        if row.times
    }
    slots = against_slots(rows)
    for name, ratio in slots.items():
        print(f"{name:14} step time / (ticks x slot cost) {ratio:.3f}")
    if args.json:
        figures = {
            "sizes": dataclasses.asdict(Sizes()),
            "stages": STAGES,
            "replicas": DATA,
            "jax": jax.__version__,
            "cases": [dataclasses.asdict(row) for row in rows],
            "step_over_no_pipeline": ratios,
            "step_over_ticks_times_slot_cost": slots,
        }
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    draw(rows, args.out)


if __name__ == "__main__":
    main()
