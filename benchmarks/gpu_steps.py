"""One JAX case of `gpu.py`: the plan's step and the same step written by hand, taking turns.

    python benchmarks/gpu_steps.py REQUEST.json RESULT.json     # started by gpu.py

Both train the same arrays: the state goes from one program to the other, so that the second needs
no memory of its own. Tokens per second are medians over rounds of steps that are dispatched one
after another and waited for once; the dispatch gap is what a step costs more when each is waited
for.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gpu_cases import (
    Case,
    Choice,
    abstract_batch,
    choose,
    flops_per_token,
    loss_of,
    make_model,
    make_optimizer,
    make_plan,
)

import shardtrain as st
from shardtrain.hardware import chip_of_device

Programs = dict[str, Callable[[Any, Any], tuple[Any, dict[str, Any]]]]


def hand_written(case: Case) -> Any:
    """The step as an experienced JAX user writes it on one device; `(state, batch)`, jitted."""
    abstract = nnx.eval_shape(lambda: make_model(case, by_hand=True)(nnx.Rngs(0)))
    graph, *_ = nnx.split(abstract)
    loss_fn, optimizer = loss_of(case), make_optimizer(case)

    def half(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def total(params: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graph, nnx.State(jax.tree.map(half, params)))
        model.embedding.dtype = jnp.bfloat16  # else it gives float32, and so does all behind it
        return loss_fn(model, batch).value

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        loss, grads = jax.value_and_grad(total)(state["params"], batch)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, moments = optimizer.update(grads, state["moments"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "moments": moments}
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        return new, {"loss": loss, "grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}

    return jax.jit(step, donate_argnums=0)


def programs_of(plan: st.Plan, case: Case, by_hand: bool) -> Programs:
    """Name -> step on the plan's state."""

    def hand(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        inner, metrics = written({"params": state.params, "moments": state.opt_state}, batch)
        return state.replace(params=inner["params"], opt_state=inner["moments"]), metrics

    found: Programs = {"shardtrain": plan.step}
    if by_hand:
        written = hand_written(case)
        found["hand-written"] = hand
    return found


def has_by_hand(case: Case) -> bool:
    """Whether the hand-written step takes the plan's state: not where its layers are stacked."""
    return case.precision == "bf16" and case.layers != "auto"


def make_batch(case: Case) -> dict[str, np.ndarray]:
    """Random tokens, each the target of the one before."""
    random = np.random.default_rng(0)
    ids = random.integers(0, case.config.vocab_size, (case.rows, case.length + 1), np.int32)
    return {"tokens": ids[:, :-1].copy(), "targets": ids[:, 1:].copy()}


def timed(program: Any, state: Any, batch: Any, steps: int, wait: bool) -> tuple[Any, float, Any]:
    """(state, seconds per step, metrics): all dispatched and then waited for, or one by one."""
    start, metrics = time.perf_counter(), {}
    for _ in range(steps):
        state, metrics = program(state, batch)
        if wait:
            jax.block_until_ready((state, metrics))
    jax.block_until_ready((state, metrics))
    return state, (time.perf_counter() - start) / steps, metrics


def measure(programs: Programs, fresh: Any, batch: Any, rounds: int, steps: int) -> Any:
    """Seconds of each program, turn by turn.

    Args:
      programs: Each takes the state from the one before.
      fresh: Makes the first state: each program's first loss is of the same parameters.
      batch: Placed.
      rounds: Times each program's turn comes.
      steps: Steps of a turn.

    Returns:
      Name -> {"step_s", "waited_s", "dispatch_us", "first_s", "loss", "peak_bytes"}.
    """
    device = jax.tree.leaves(batch)[0].devices().pop()
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in programs}
    state = None
    for name, program in programs.items():
        state = None  # else there would be two
        state, first, metrics = timed(program, fresh(), batch, 1, True)
        # The first program's peak is its own; the allocator never forgets a higher one.
        found[name] = {"first_s": first, "loss": float(metrics["loss"]), "peak_bytes": peak(device)}
        state, _, _ = timed(program, state, batch, 1, True)
    for turn in range(rounds):
        names = list(programs) if turn % 2 else list(programs)[::-1]
        for name in names:
            state, seconds, _ = timed(programs[name], state, batch, steps, False)
            times[name].append(seconds)
    for name, program in programs.items():
        state, waited, _ = timed(program, state, batch, steps, True)
        dispatches = []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = program(state, batch)
            dispatches.append(time.perf_counter() - start)
            jax.block_until_ready((state, metrics))
        found[name] |= {
            "step_s": statistics.median(times[name]),
            "rounds_s": times[name],
            "waited_s": waited,
            "dispatch_us": 1e6 * statistics.median(dispatches),
        }
    return found


def peak(device: Any) -> int | None:
    """Most bytes in use so far; None where the backend does not say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def limit(device: Any) -> float:
    """Bytes a program may use on this device."""
    stats = device.memory_stats() or {}
    return float(stats.get("bytes_limit", 4e9))


def fitting_plan(case: Case, request: dict[str, Any], device: Any) -> tuple[st.Plan, Choice]:
    """The first choice whose compiled step fits too.

    Raises:
      st.errors.OutOfMemoryError: Not even the smallest does.
    """
    tokens = tuple(request["tokens"])
    while tokens:
        choice = choose(case, limit(device), tokens)
        if choice.case is None:
            break
        plan = make_plan(choice.case, devices=[device])
        compiled = plan.compile()
        if (compiled.peak_bytes or 0) <= limit(device):
            return plan, choice
        tokens = tuple(t for t in tokens if t < choice.case.tokens)
    raise st.errors.OutOfMemoryError(f"{case.name} does not fit {limit(device) / 2**30:.0f} GiB")


def run_case(request: dict[str, Any]) -> dict[str, Any]:
    """Choose, compile, time; a JSON-able record."""
    device = jax.devices()[0]
    case = Case(**request["case"])
    plan, choice = fitting_plan(case, request, device)
    case = choice.case or case
    compiled, memory = plan.compile(), plan.memory()
    batch = plan.place(make_batch(case))
    programs = programs_of(plan, case, has_by_hand(case))
    fresh = lambda: plan.init(0)
    timings = measure(programs, fresh, batch, request["rounds"], request["steps"])
    chip = chip_of_device(device.device_kind)
    chip_peak = chip.peak_flops("bf16") if chip else None
    per_step = flops_per_token(case.config, case.length) * case.tokens
    for row in timings.values():
        row["tokens_per_s"] = case.tokens / row["step_s"]
        row["gap_ms"] = 1e3 * (row["waited_s"] - row["step_s"])
        row["mfu"] = per_step / row["step_s"] / chip_peak if chip_peak else None
    return {
        "case": dataclasses.asdict(case),
        "name": case.name,
        "config": dataclasses.asdict(case.config),
        "tokens_per_step": case.tokens,
        "planned_bytes": memory.total,
        "rejected": choice.rejected[:6],
        "compiled_peak_bytes": compiled.peak_bytes,
        "compiled_temp_bytes": compiled.temp_bytes,
        "compile_s": compiled.seconds,
        "compiled_flops": compiled.flops,
        "fused_attention": compiled.hlo.count('"__cudnn$fmha'),
        "estimated_step_s": plan.estimate().step_time,
        "model_flops": per_step,
        "peak_flops": chip_peak,
        "device": device.device_kind,
        "jax": jax.__version__,
        "programs": timings,
    }


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    jax.config.update("jax_compilation_cache_dir", request["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    abstract_batch(Case(**request["case"]))  # a bad request fails before anything is made
    Path(sys.argv[2]).write_text(json.dumps(run_case(request)))


if __name__ == "__main__":
    main()
