"""Published training runs: their records, and each record as a `Job`.

A record names its model, hardware, layout and software in the words of its source; much is often
missing. `read_point` fills the gaps with the usual defaults and looks known architectures up in
the catalogue. It never reads `measured`, `derived` or `note` (which quotes measured values).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from shardtrain.hardware import Chip
from shardtrain.planner.catalogue import Model
from shardtrain.planner.job import Job
from shardtrain.planner.points_hardware import read_hardware
from shardtrain.planner.points_models import read_model
from shardtrain.planner.points_stack import (
    PLAIN_ATTENTION,
    Stack,
    gradient_bytes,
    read_precision,
    read_remat,
    read_stack,
    runtime_bytes,
)


@dataclass(frozen=True)
class Point:
    """A record made plain.

    Attributes:
        id: name of the run.
        source: publication it is from.
        stack: software that ran it.
        recipe: the finer kind of precision, for example "mxfp8".
        task: "pre-training", "sft" or "lora".
        job: everything in numbers.
        kernels: "compiled", "async": what an otherwise equal run may lack.
    """

    id: str
    source: str
    stack: Stack
    recipe: str
    task: str
    job: Job
    kernels: str = ""


@dataclass(frozen=True)
class _Layout:
    """Axis sizes and batches of a record."""

    chips: int
    tensor: int
    pipeline: int
    context: int
    virtual: int
    schedule: str
    batch: float
    micro: float

    @property
    def replicas(self) -> float:
        return max(1.0, self.chips / (self.tensor * self.pipeline * self.context))


def read_point(record: Mapping[str, Any]) -> Point:
    """A record as a `Point`; see the module for what is never read.

    Args:
        record: an entry of `measured_points.json`; `measured` and `derived` may be absent.

    Raises:
        HardwareError: its chip is not known.
    """
    p = record.get("parallel") or {}
    stack, model, found = read_stack(record), read_model(record), read_hardware(record)
    kind, recipe = read_precision(record)
    sequence = int(_number((record.get("model") or {}).get("seq_len"), 4096))
    at = _layout(record, stack, model, found, sequence)
    fsdp, zero = _sharding(p, stack, at.replicas, found.kind)
    slices = int(_number(p.get("dp_dcn"), _number(p.get("slices"), 1)))
    megascale = stack.family == "megatron-lm" and "megascale" in str(record.get("id"))
    flash = megascale or stack.family not in PLAIN_ATTENTION
    parts = max(1.0, at.batch / (at.micro * at.replicas))
    sequence_parallel = stack.group == "megatron" or stack.family == "torchtitan"
    job = Job(
        model, found, at.chips, sequence, at.micro, parts, at.tensor, at.pipeline, at.context,
        int(_number(p.get("ep"), 1)), fsdp, zero, at.virtual, at.schedule,
        read_remat(record, stack, model.params), kind, sequence_parallel or bool(p.get("sp")),
        slices if found.kind == "tpu" else 1, flash, flash or stack.group != "megatron-old",
        _task(record) == "lora", gradient_bytes(stack, model, at.pipeline),
        bool(p.get("offload")), "offload" in str(p.get("remat")),
        runtime_bytes=runtime_bytes(stack, model, at.pipeline),
        logit_bytes={"llm-foundry": 4.0, "torchtitan": 10.0}.get(stack.family, 8.0),
        tuned_attention=stack.group != "fsdp" or found.name.startswith("a100"),
    )  # fmt: skip
    source = re.sub(r" line \d+$", "", str(record.get("source") or ""))
    name = str(record.get("id") or "")
    return Point(name, source, stack, recipe, _task(record), job, _kernels(record, stack))


def _task(record: Mapping[str, Any]) -> str:
    if "lora" in str((record.get("model") or {}).get("name") or "").lower():
        return "lora"
    return str((record.get("parallel") or {}).get("task") or "pre-training")


def _kernels(record: Mapping[str, Any], stack: Stack) -> str:
    p = record.get("parallel") or {}
    compiled = p.get("compile") is True or "torch.compile" in str(record.get("framework"))
    kernels = "compiled" if compiled and stack.group == "fsdp" else ""
    return kernels + (" async" if p.get("async_tp") is True else "")


def _layout(
    record: Mapping[str, Any], stack: Stack, model: Model, found: Chip, sequence: int
) -> _Layout:
    """Axis sizes, chunks and batches; what is unsaid is what the software usually does."""
    p = record.get("parallel") or {}
    count = int(_number((record.get("hardware") or {}).get("count"), 8))
    tensor = int(_number(p.get("tp"), _number(p.get("ici_tp"), 1)))
    pipeline, context = int(_number(p.get("pp"), 1)), int(_number(p.get("cp"), 1))
    if not p.get("tp") and stack.group == "megatron" and model.params > 20e9:
        tensor = min(8, count)  # Megatron splits matmuls within a host first
    if "pp" not in p and stack.group in {"megatron", "megatron-old"}:
        pipeline = _needed_stages(model, found, count // tensor, tensor)
    count = max(count, tensor * pipeline * context)
    virtual = int(_number(p.get("vp"), 1))
    usual = max(1, min(4, model.layers // pipeline // 2))
    if stack.group == "megatron" and pipeline > 1 and "vp" not in p:
        virtual = usual
    schedule = "interleaved" if virtual > 1 or "interleaved" in str(p.get("schedule")) else "1f1b"
    if schedule == "interleaved" and virtual == 1 and not p.get("vp"):
        virtual = usual
    replicas = max(1.0, count / (tensor * pipeline * context))
    batch, micro = _batches(record, stack, count, sequence, replicas, pipeline)
    return _Layout(count, tensor, pipeline, context, virtual, schedule, batch, micro)


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else default


def _needed_stages(model: Model, found: Chip, groups: int, tensor: int) -> int:
    """Stages an unnamed pipeline must have for weights and gradients to fit half of memory."""
    stages = 1
    while stages < 64 and groups % (2 * stages) == 0:
        if 6 * model.params / (tensor * stages) < found.memory / 2:
            break
        stages *= 2
    return stages


def _batches(record: Mapping[str, Any], stack: Stack, count: int, sequence: int, replicas: float,
             pipeline: int) -> tuple[float, float]:  # fmt: skip
    """(global batch, microbatch per replica), in sequences."""
    p = record.get("parallel") or {}
    batch = _number(p.get("global_batch"), 0)
    tokens = _number(p.get("tokens_per_device_per_step"), _number(p.get("tokens_per_device"), 0))
    per_device = _number(p.get("per_device_batch"), 0)
    micro = _number(p.get("microbatch"), 0)
    if not batch and per_device:
        batch = per_device * count
    if not batch and tokens:
        batch = tokens * count / sequence
    if not batch and isinstance(p.get("tokens_per_batch"), (int, float)):
        batch = p["tokens_per_batch"] / sequence
    if not batch:
        batch = _number(p.get("batch_per_dp"), 0) * replicas
    parts = _number(p.get("num_microbatches"), _number(p.get("grad_accum"), 0))
    if not micro and parts and batch:
        micro = batch / parts / replicas
    if not micro and (pipeline > 1 or stack.group in {"megatron", "megatron-old"}):
        micro = 1.0
    if not micro and batch:
        micro = batch / replicas
    micro = micro or max(1.0, 16384 // sequence)
    if not batch:
        batch = micro * replicas
    return batch, min(micro, max(batch / replicas, 1e-9)) if batch >= replicas else batch / replicas


def _sharding(p: Mapping[str, Any], stack: Stack, replicas: float, kind: str) -> tuple[int, int]:
    """(chips parameters are shared over, ZeRO level)."""
    fsdp = p.get("fsdp") or p.get("ici_fsdp") or p.get("ici_fsdp_transpose") or 0
    size = int(fsdp) if isinstance(fsdp, (int, float)) else 0
    level = p.get("zero")
    level = int(level) if isinstance(level, (int, float)) else 1
    if "shards optimizer+grads" in str(p.get("zero")):
        return int(replicas), 2
    if size < 0 or (size <= 1 and stack.group in {"fsdp", "xla"} and not p.get("dp")):
        size, level = int(replicas), 3
        slices = _number(p.get("dp_dcn"), _number(p.get("slices"), 1))
        size = max(1, int(size / slices)) if kind == "tpu" else size
    if str(p.get("sharding")) == "SHARD_GRAD_OP":
        return max(size, 1), 2
    if level >= 2 and size <= 1:
        return int(replicas), level
    return (min(size, max(1, int(replicas))), 3) if size > 1 else (1, level)


def load_points() -> list[dict[str, Any]]:
    """The published points the calibration is fitted on, as records."""
    text = resources.files("shardtrain.planner").joinpath("data/measured_points.json").read_text()
    return json.loads(text)
