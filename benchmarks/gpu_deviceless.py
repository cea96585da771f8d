"""What `gpu.py` can know without a GPU: the real GPU compiler's account of the same steps.

Memory, FLOPs, communication and kernels are the compiler's; there is no time in here, because the
compiler without a device does not tune its kernels, and nothing runs. The workspace of cuDNN's
attention is not in its memory.
"""

import collections
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from gpu_cases import (
    MARGIN,
    Case,
    abstract_batch,
    choose,
    flops_per_token,
    make_optimizer,
    make_plan,
)
from gpu_steps import hand_written
from jax.sharding import SingleDeviceSharding

import shardtrain as st
from shardtrain.errors import ShardtrainError
from shardtrain.planner.compiled import Compiled, accepted_options, compile_lowered
from shardtrain.planner.gpu_targets import TARGETS
from shardtrain.planner.targets import target_devices
from shardtrain.xla_options import PRESETS, compiler_options

ONE, EIGHT, TPU = "h200:1", "h100:1x8", "v5e:2x2"
_CALL = re.compile(r'custom_call_target="([^"]+)"')
_OPCODE = re.compile(r"^\s+(?:ROOT )?%?\S+ = .*? ([a-z][a-z\-]*)\(", re.MULTILINE)
BASE = Case("1B", 4096, rows=4, remat="dots_no_batch", attention="cudnn")


def account(found: Compiled) -> dict[str, Any]:
    """What is kept of a compiled step."""
    opcodes = collections.Counter(_OPCODE.findall(found.hlo))
    traffic: dict[str, list[int]] = {}
    for c in found.collectives:
        row = traffic.setdefault(f"{c.kind} over {'+'.join(c.axes)}", [0, 0])
        row[0] += c.count
        row[1] += c.count * c.bytes
    return {
        "flops": found.flops,
        "uncounted": found.uncounted,
        "argument_bytes": found.argument_bytes,
        "temp_bytes": found.temp_bytes,
        "peak_bytes": found.peak_bytes,
        "compile_s": round(found.seconds, 1),
        "custom_calls": dict(collections.Counter(_CALL.findall(found.hlo))),
        "instructions": sum(opcodes.values()),
        "fusions": opcodes["fusion"],
        "loops": opcodes["while"],
        "triton_fusions": len(re.findall(r'"kind":"__triton', found.hlo)),
        "collectives": {k: {"count": n, "bytes": b} for k, (n, b) in traffic.items()},
    }


def plan_account(case: Case, where: str = ONE, **options: Any) -> dict[str, Any]:
    """The step of `st.plan` for hardware that is not here."""
    plan = make_plan(case, hardware=where, **options)
    found = plan.compile()
    per_step = flops_per_token(case.config, case.length) * case.tokens
    return {
        "case": dataclasses.asdict(case),
        "strategy": str(plan.strategy),
        "hardware": where,
        "note": found.note,
        **account(found),
        "planned_bytes": plan.memory().total,
        "model_flops": per_step / plan.mesh.size,
        "estimated_step_s": plan.estimate().step_time,
    }


def hand_account(case: Case) -> dict[str, Any]:
    """The hand-written step for the same device."""
    target = target_devices(ONE)
    mesh = jax.make_mesh((1,), ("data",), devices=list(target.devices))
    there = SingleDeviceSharding(target.devices[0])
    put = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree
    )
    params = make_plan(case).abstract_state.params
    moments = jax.eval_shape(make_optimizer(case).init, params)
    lowered = hand_written(case).lower(
        put({"params": params, "moments": moments}), put(abstract_batch(case))
    )
    return account(compile_lowered(lowered, mesh, options=compiler_options(case.xla, "gpu")))


def steps() -> dict[str, Any]:
    """Every shape: which batch fits by `plan.memory()`, and that step compiled; also by hand."""
    found: dict[str, Any] = {}
    limit = 0.95 * TARGETS["h200"].memory
    for shape in ("0.5B", "1B", "3B", "8B"):
        for length in (4096, 8192):
            case = Case(shape, length, attention="cudnn")
            choice = choose(case, limit)
            record: dict[str, Any] = {"rejected": choice.rejected, "margin": MARGIN}
            if choice.case is not None:
                record |= plan_account(choice.case)
                record["fits"] = record["peak_bytes"] <= limit
                if length == 4096:
                    record["hand"] = hand_account(choice.case)
                if length == 4096 and choice.case.xla != "off":
                    off = dataclasses.replace(choice.case, xla="off")
                    record["xla_off"] = plan_account(off)
            found[case.name] = record
            say(case.name, record)
    return found


def tuning() -> dict[str, Any]:
    """One knob at a time, from the 1B decoder at 4 x 4096 tokens with everything on."""
    change = dataclasses.replace
    variants = {
        "base": BASE,
        "attention: XLA's": change(BASE, attention="xla"),
        "attention: written out": change(BASE, attention="einsum"),
        "attention: XLA's, remat: none": change(BASE, attention="xla", remat="none"),
        "logits all at once": change(BASE, chunks=0),
        "remat: none": change(BASE, remat="none"),
        "remat: dots": change(BASE, remat="dots"),
        "remat: full": change(BASE, remat="full"),
        "layers written out": change(BASE, layers="unrolled"),
        "layers written out, remat: none": change(BASE, layers="unrolled", remat="none"),
        "layers in a loop by the plan": change(BASE, layers="auto"),
        "layers in a loop by the plan, remat: none": change(BASE, layers="auto", remat="none"),
        "Adam's first moment in bf16": change(BASE, moments="bf16"),
        "FP8 matmuls": change(BASE, precision="fp8", xla="cublas"),
        "xla=cublas": change(BASE, xla="cublas"),
        "xla=latency-hiding": change(BASE, xla="latency-hiding"),
        "xla=no-command-buffers": change(BASE, xla="no-command-buffers"),
    }
    found = {}
    for name, case in variants.items():
        found[name] = attempt(lambda case=case: plan_account(case))
        say(name, found[name])
    found["nothing donated"] = attempt(lambda: plan_account(BASE, donate=False))
    say("nothing donated", found["nothing donated"])
    return found


def eight() -> dict[str, Any]:
    """8B over 8 H100s with FSDP: communication, by preset."""
    case = Case("8B", 4096, rows=8, remat="full", layers="auto", attention="cudnn")
    found = {}
    for xla in ("off", "latency-hiding", *(p for p in PRESETS if "collective" in p)):
        strategy = st.Strategy(fsdp=8, precision="bf16", remat="full", xla=xla)
        found[xla] = attempt(lambda strategy=strategy: plan_account(case, EIGHT, strategy=strategy))
        say(xla, found[xla])
    return found


def presets() -> dict[str, Any]:
    """Which presets each compiler takes."""
    found: dict[str, Any] = {}
    for where in (ONE, TPU):
        target = target_devices(where)
        if target.is_proxy:
            found[where] = target.note
            continue
        rows = found[where] = {}
        for name, platforms in PRESETS.items():
            if target.platform in platforms:
                options = compiler_options(name, target.platform)
                rows[name] = attempt(
                    lambda o=options, t=target: {"accepted": accepted_options(o, t.devices[0])}
                )
    return found


def attempt(make: Any) -> dict[str, Any]:
    """The record, or what the compiler or we say against it."""
    try:
        return make()
    except (ShardtrainError, jax.errors.JaxRuntimeError, ImportError) as error:
        return {"refused": str(error).splitlines()[0][:300]}


def say(name: str, record: dict[str, Any]) -> None:
    gib = lambda key: f"{(record.get(key) or 0) / 2**30:.1f}"
    if "peak_bytes" not in record:
        print(f"{name}: {record.get('refused', 'nothing fits')}", flush=True)
        return
    print(
        f"{name}: peak {gib('peak_bytes')} GiB, temporaries {gib('temp_bytes')}, planned "
        f"{gib('planned_bytes')}; {record.get('flops', 0) / 1e12:.1f} TFLOP of "
        f"{record.get('model_flops', 0) / 1e12:.1f}; {record.get('custom_calls')}; "
        f"{record.get('compile_s')} s",
        flush=True,
    )


PARTS = {"presets": presets, "tuning": tuning, "steps": steps, "eight": eight}


def run(only: list[str]) -> Iterator[dict[str, Any]]:
    """All parts, or those asked for, one after another.

    Raises:
      SystemExit: The GPU compiler is not installed.
    """
    target = target_devices(ONE)
    if target.is_proxy:
        raise SystemExit(f"nothing to learn here: {target.note}")
    for name in only or PARTS:
        start = time.perf_counter()
        yield {"compiler": target.note, name: PARTS[name]()}
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
