"""The real TPU and GPU compilers on pipelined steps of a realistic width, without the hardware.

    python benchmarks/pipeline_compile.py v5e:2x4 h100:1x8 --json pipeline_compile.json

Compiles one training step (AdamW, bf16) of a decoder of width 1024 for every schedule over
`data=2,tensor=2,pipeline=2`, and prints seconds, temporary memory and communication. It needs the
compiler of the hardware: `pip install shardtrain[tpu]` or `shardtrain[cuda]`; without it that
hardware is left out with a sentence. Compiling takes minutes, and nothing runs.
"""

import argparse
import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shardtrain as st
from shardtrain.models.decoder import Decoder, DecoderConfig
from shardtrain.planner.targets import compiler_for

STRATEGY = "data=2,tensor=2,pipeline=2,num_microbatches=8,precision=bf16"
SCHEDULES = {
    "gpipe": "schedule=gpipe",
    "1f1b": "schedule=1f1b",
    "interleaved": "schedule=interleaved,virtual_stages=2",
    "zero-bubble": "schedule=zero-bubble",
}
ROWS, LENGTH = 64, 1024
CONFIG = DecoderConfig(
    vocab_size=8192,
    num_layers=8,
    embed_dim=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=4096,
)


def loss(model: Any, batch: dict[str, jax.Array]) -> st.Mean:
    return st.cross_entropy(model(batch["tokens"]), batch["targets"])


def make_plan(schedule: str) -> Any:
    """The plan of one schedule, on abstract arrays."""
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    return st.plan(
        lambda rngs: Decoder(CONFIG, rngs=rngs),
        loss,
        optax.adamw(1e-3),
        {"tokens": tokens, "targets": tokens},
        f"{STRATEGY},{SCHEDULES[schedule]}",
    )


def figures(schedule: str, hardware: str) -> dict[str, Any]:
    """What the compiler says of one schedule's step."""
    plan = make_plan(schedule)
    found = plan.compile(hardware=hardware)
    moved: collections.Counter[str] = collections.Counter()
    for each in found.collectives:
        moved[f"{each.kind} over {','.join(each.axes)}"] += each.count * each.bytes
    return {
        "hardware": hardware,
        "schedule": schedule,
        "platform": found.platform,
        "seconds": round(found.seconds, 1),
        "temp_bytes": found.temp_bytes,
        "argument_bytes": found.argument_bytes,
        "bubble": float(plan.schedule.bubble_fraction),
        "collective_bytes": dict(sorted(moved.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hardware", nargs="+", help="eight chips, e.g. v5e:2x4 or h100:1x8")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--json", help="where the figures go; those of other cases there stay")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    path = Path(args.json) if args.json else None
    kept = json.loads(path.read_text())["cases"] if path and path.exists() else []
    cases = {(case["hardware"], case["schedule"]): case for case in kept}
    for hardware in args.hardware:
        platform, missing = compiler_for(st.hardware(hardware))
        if missing:
            print(f"{hardware}: left out: {missing}")
            continue
        for schedule in args.schedules:
            case = cases[hardware, schedule] = figures(schedule, hardware)
            print(
                f"{hardware} ({platform}) {schedule:12} compiled in {case['seconds']:.1f} s, "
                f"temp {case['temp_bytes'] / 2**20:.1f} MiB",
                flush=True,
            )
            if path:
                written = {
                    "model": dataclasses.asdict(CONFIG) | {"rows": ROWS, "length": LENGTH},
                    "strategy": STRATEGY,
                    "jax": jax.__version__,
                    "cases": list(cases.values()),
                }
                path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
