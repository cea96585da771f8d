"""How long a training step takes to compile: by layers, scanned or not, cold or warm, by devices.

    python benchmarks/compile.py layers [--layers 12 24 48 80] [--json compile.json]
    python benchmarks/compile.py chips v5p h100 [--counts 8 64 512 4096] [--json compile.json]

`layers` plans and compiles a decoder (width 64) on 8 virtual CPU devices, each case in a process of
its own with an empty compilation cache, and once more with the cache the first left. `chips` asks
the real compilers, without the hardware, for a decoder (width 1024) over data, fsdp=8 and tensor
on ever more chips with the same rows per chip; it needs `shardtrain[tpu]` or `shardtrain[cuda]`.
Nothing is trained.
"""

import argparse
import dataclasses
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from pipeline_compile import CONFIG, loss

import shardtrain as st
from shardtrain.models.decoder import Decoder, DecoderConfig
from shardtrain.planner.targets import compiler_for

LAYERS = (12, 24, 48, 80)
FORMS = {"as a loop": "scan_layers=true", "one by one": "scan_layers=false"}
COUNTS = (8, 64, 512, 4096)
SMALL = DecoderConfig(
    vocab_size=256, embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=256
)
LENGTH = 1024


def make_plan(config: DecoderConfig, rows: int, length: int, strategy: str, **options: Any) -> Any:
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}
    make = lambda rngs: Decoder(config, rngs=rngs)
    return st.plan(make, loss, optax.adamw(1e-3), batch, strategy, **options)


def compile_once(layers: int, form: str, cache: str) -> dict[str, Any]:
    """Seconds of one plan and its compilation in this process."""
    st.simulate(8)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = dataclasses.replace(SMALL, num_layers=layers)
    start = time.perf_counter()
    plan = make_plan(config, 16, 64, f"data=2,fsdp=2,tensor=2,{FORMS[form]}")
    planned = time.perf_counter()
    lowered = plan._lower_step()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    return {
        "plan": round(planned - start, 2),
        "trace": round(traced - planned, 2),
        "compile": round(end - traced, 2),
        "operations": compiled.as_text().count(" = "),
        "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def in_a_process(layers: int, form: str, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", str(layers), form, cache]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def by_layers(counts: list[int]) -> list[dict[str, Any]]:
    """Cold and warm, for every number of layers and both forms."""
    cases = []
    for form in FORMS:
        for layers in counts:
            with tempfile.TemporaryDirectory() as cache:
                cold, warm = (in_a_process(layers, form, cache) for _ in range(2))
            case = {"layers": layers, "form": form, "cold": cold, "warm": warm}
            cases.append(case)
            print(
                f"{layers} layers {form}: plan {cold['plan']} s, trace {cold['trace']} s, "
                f"compile {cold['compile']} s cold and {warm['compile']} s warm, "
                f"{cold['operations']} operations, "
                f"temp {cold['temp_bytes'] / 2**20:.1f} MiB",
                flush=True,
            )
    return cases


def topology(chip: str, count: int) -> str:
    """`v5p:4x4x4` or `h100:8x8` for so many chips."""
    if chip.startswith(("h", "a", "b", "gb")):
        return f"{chip}:{count // 8}x8"
    dims = 3 if chip in ("v4", "v5p") else 2
    power = int(math.log2(count))
    sizes = [2 ** (power // dims + (i < power % dims)) for i in range(dims)]
    return f"{chip}:{'x'.join(map(str, sorted(sizes)))}"


def on_chips(chip: str, count: int) -> dict[str, Any]:
    """What the compiler says of the same rows per chip on `count` chips."""
    hardware = topology(chip, count)
    tensor = 2 if count >= 64 else 1
    strategy = f"data={count // (8 * tensor)},fsdp=8,tensor={tensor},precision=bf16"
    start = time.perf_counter()
    plan = make_plan(CONFIG, 2 * count, LENGTH, strategy, hardware=hardware)
    planned = time.perf_counter() - start
    found = plan.compile()
    estimate = plan.estimate()
    return {
        "chips": count,
        "hardware": hardware,
        "strategy": strategy,
        "compiler": found.note,
        "plan_seconds": round(planned, 1),
        "compile_seconds": round(found.seconds, 1),
        "memory_bytes": (found.argument_bytes or 0) + (found.temp_bytes or 0),
        "collective_bytes": sum(c.bytes * c.count for c in found.collectives),
        "step_seconds": estimate.step_time,
        "tokens_per_second_per_chip": 2 * LENGTH / estimate.step_time,
    }


def by_chips(chips: list[str], counts: list[int]) -> list[dict[str, Any]]:
    cases = []
    for chip in chips:
        first = None
        for count in counts:
            _, missing = compiler_for(st.hardware(topology(chip, count)))
            if missing:
                print(f"{chip}: left out: {missing}")
                break
            case = on_chips(chip, count)
            first = first or case["tokens_per_second_per_chip"]
            case["efficiency"] = case["tokens_per_second_per_chip"] / first
            cases.append(case)
            print(
                f"{case['hardware']} ({count} chips): compiled in {case['compile_seconds']} s, "
                f"{case['memory_bytes'] / 2**30:.2f} GiB and "
                f"{case['collective_bytes'] / 2**20:.0f} MiB sent per device, "
                f"predicted efficiency {case['efficiency']:.0%}",
                flush=True,
            )
    return cases


def write(path: str, part: str, cases: list[dict[str, Any]]) -> None:
    """Put one part's cases into a results file, and keep the other part's."""
    file = Path(path)
    found = json.loads(file.read_text()) if file.exists() else {}
    found[part] = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "machine": f"{platform.machine()}, {platform.python_version()}",
        "cases": cases,
    }
    file.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(compile_once(int(sys.argv[2]), *sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    layers = parts.add_parser("layers")
    layers.add_argument("--layers", nargs="+", type=int, default=list(LAYERS))
    chips = parts.add_parser("chips")
    chips.add_argument("chip", nargs="+")
    chips.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    for each in (layers, chips):
        each.add_argument("--json", help="where the figures go; those of the other part stay")
    args = parser.parse_args()
    cases = by_layers(args.layers) if args.part == "layers" else by_chips(args.chip, args.counts)
    if args.json:
        write(args.json, args.part, cases)


if __name__ == "__main__":
    main()
