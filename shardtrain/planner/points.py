"""Published training runs: their records, and each record as a `Job`.

A record names its model, hardware, layout and software in the words of its source; much is often
missing. `read_point` fills the gaps with the usual defaults and looks known architectures up in
the catalogue. It never reads `measured`, `derived` or `note` (which quotes measured values).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from shardtrain.errors import HardwareError
from shardtrain.hardware import CHIPS, Chip, chip
from shardtrain.planner.catalogue import CATALOGUE, Model, get, variant
from shardtrain.planner.job import Job


@dataclass(frozen=True)
class Stack:
    """Which software ran a point.

    Attributes:
        family: one code base, for example "megatron-bridge".
        group: related code bases, for example "megatron".
        version: year and month where the name has one, else 0.
    """

    family: str
    group: str
    version: float


_FAMILIES = (
    ("megatron-bridge", "megatron-bridge", "megatron"),
    ("nemo", "megatron-bridge", "megatron"),
    ("megatron-deepspeed", "megatron-deepspeed", "megatron-old"),
    ("megatron-core", "megatron-core", "megatron"),
    ("ptd-p", "megatron-ptdp", "megatron-old"),
    ("ptd", "megatron-ptdp", "megatron-old"),
    ("megatron", "megatron-lm", "megatron-old"),
    ("megascale", "megascale", "megatron"),
    ("llm-foundry", "llm-foundry", "fsdp"),
    ("torchtitan", "torchtitan", "fsdp"),
    ("fsdp", "pytorch-fsdp", "fsdp"),
    ("xla", "pytorch-xla", "xla"),
    ("deepspeed", "deepspeed", "deepspeed"),
    ("maxtext", "maxtext", "xla"),
    ("axlearn", "axlearn", "xla"),
    ("pax", "pax", "xla"),
    ("levanter", "levanter", "xla"),
    ("alpa", "alpa", "xla"),
    ("llm.c", "llm.c", "llm.c"),
    ("meta", "meta", "fsdp"),
)

_PLAIN_ATTENTION = {"megatron-deepspeed", "megatron-ptdp", "pax", "levanter", "alpa", "megatron-lm"}


def read_stack(record: Mapping[str, Any]) -> Stack:
    """The software of a record; unknown software is its own family."""
    framework = str(record.get("framework") or "").lower()
    name = str(record.get("id") or "").lower()
    version = re.search(r"(\d\d)\.?(\d\d)(?:\.(\d\d))?", framework)
    when = 0.0
    if version:
        year, month, patch = version.groups()
        when = int(year) + (int(month) + (0.5 if patch else 0.0)) / 12
    modern = str((record.get("hardware") or {}).get("chip") or "")[:1] in {"H", "B", "G"}
    for text in (name if "axlearn-" in name or "megascale-" in name else "", framework):
        tail = re.sub(r"^(axlearn|megascale)-", "", text)
        for word, family, group in _FAMILIES:
            if word in tail:
                if family == "megatron-lm" and modern:
                    family, group = "megatron-core", "megatron"
                return Stack(family, group, when)
    return Stack(framework or "unknown", framework or "unknown", when)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_NAMES = (
    ("deepseekv4flash", "deepseek-v4-flash"),
    ("deepseekv3", "deepseek-v3"),
    ("deepseek3", "deepseek-v3"),
    ("deepseekr1", "deepseek-v3"),
    ("kimi", "kimi-k2"),
    ("qwen3235b", "qwen3-235b-a22b"),
    ("qwen330b", "qwen3-30b-a3b"),
    ("gptoss120b", "gpt-oss-120b"),
    ("gptoss20b", "gpt-oss-20b"),
    ("nemotron3nano", "nemotron-3-nano"),
    ("nemotron3super", "nemotron-3-super"),
    ("nemotron3ultra", "nemotron-3-ultra"),
    ("nemotron35lightning", "nemotron-3.5-lightning"),
    ("nemotron340b", "nemotron-4-340b"),
    ("nemotron4340b", "nemotron-4-340b"),
    ("nemotron15b", "nemotron-4-15b"),
    ("nemotron415b", "nemotron-4-15b"),
    ("mixtral8x22b", "mixtral-8x22b"),
    ("mixtral8x7b", "mixtral-8x7b"),
    ("llama4scout", "llama4-scout-17b-16e"),
    ("llama4maverick", "llama4-maverick-17b-128e"),
    ("llama31405b", "llama3-405b"),
    ("llama3405b", "llama3-405b"),
    ("llama3170b", "llama3-70b"),
    ("llama370b", "llama3-70b"),
    ("llama318b", "llama3-8b"),
    ("llama38b", "llama3-8b"),
    ("gemma34b", "gemma3-4b"),
    ("gemma312b", "gemma3-12b"),
    ("gemma327b", "gemma3-27b"),
    ("gemma226b", "gemma2-27b"),
)

# Shapes that are not published in full: sized so that total and active parameters match.
_APPROXIMATE = {
    "deepseek-v4-flash": Model("deepseek-v4-flash", 43, 4096, 64, 8, 128, 0, 129280, experts=256,
                               top_k=6, expert_ff=2048, shared_ff=2048, mtp=1),
    "nemotron-3-ultra": Model("nemotron-3-ultra", 108, 8192, 64, 2, 128, 0, 131072, 2, experts=512,
                              top_k=22, expert_ff=5120, shared_ff=10240, moe_layers=48,
                              expert_latent=2048, attention_layers=12, mamba_layers=48,
                              mamba_params=400_000_000),
    "nemotron-3.5-lightning": variant("nemotron-3-nano", top_k=8),
}  # fmt: skip


def read_model(record: Mapping[str, Any]) -> Model:
    """The model of a record: its printed dims, else the catalogue, else a shape of that size."""
    m = record.get("model") or {}
    name = str(m.get("name") or "")
    if m.get("d_model") and m.get("layers"):
        return _printed_model(name, m)
    key = _key(name)
    for word, known in _NAMES:
        if word in key:
            found = _APPROXIMATE.get(known) or get(known)
            megatron = read_stack(record).group == "megatron"
            if known == "deepseek-v3" and megatron and "womtp" not in key:
                found = variant(known, mtp=1)
            return found
    for known in CATALOGUE:
        if key and (_key(known) in key or key in _key(known)):
            return get(known)
    return _sized_model(name, key, m)


def _printed_model(name: str, m: Mapping[str, Any]) -> Model:
    heads = int(m.get("n_heads") or max(1, m["d_model"] // 128))
    moe = m.get("moe") or {}
    experts, ff = int(moe.get("experts") or 0), int(m.get("d_ff") or 4 * m["d_model"])
    shape = Model(
        name, int(m["layers"]), int(m["d_model"]), heads, int(m.get("n_kv_heads") or heads),
        int(m.get("head_dim") or m["d_model"] // heads), ff, int(m.get("vocab") or 32000),
        int(m.get("mlp_matrices") or 3), bool(m.get("tied_embeddings")), experts=experts,
        top_k=int(moe.get("top_k") or 0), expert_ff=ff if experts else 0,
    )  # fmt: skip
    return shape


def _sized_model(name: str, key: str, m: Mapping[str, Any]) -> Model:
    """A dense or mixture model of about the size that its name tells."""
    active = re.search(r"(?<![a-z])a(\d+(?:\.\d+)?)b(?![a-z])", name.lower())
    sizes = re.findall(r"(\d+(?:\.\d+)?)\s*([mb])(?![a-z])", name.lower())
    billions = [float(n) * (1e-3 if unit == "m" else 1.0) for n, unit in sizes]
    total = max(billions, default=7.0)
    told = m.get("moe") or {}
    moe = bool(told) or bool(active) or "moe" in key or "deepseek" in key
    dense = float(active.group(1)) if active else total / 8  # usual sparsity of mixtures
    if not moe:
        dense = total
    width = max(512, round((dense * 1e9 * 128 / 12) ** (1 / 3) / 128) * 128)
    layers = max(4, round(dense * 1e9 / (12 * width * width)))
    heads = max(1, width // 128)
    if not moe:
        return Model(name, layers, width, heads, heads, 128, 4 * width, 50304, 2, total < 2)
    experts = int(told.get("experts") or 64)
    top_k = int(told.get("top_k") or 4)
    routed = max(0.1, total - dense) * 1e9 / max(experts - top_k, 1) / layers
    ff = max(64, round(routed / (3 * width)))
    return Model(name, layers, width, heads, 8, 128, 0, 64000, experts=experts, top_k=top_k,
                 expert_ff=ff)  # fmt: skip


_PRECISIONS = (("fp4", "fp4"), ("fp8", "fp8"), ("int8", "int8"))


def read_precision(record: Mapping[str, Any]) -> tuple[str, str]:
    """(class, recipe): what linear layers compute in, and the finer kind of it."""
    text = str((record.get("parallel") or {}).get("precision") or "bf16").lower()
    kind = next((kind for word, kind in _PRECISIONS if word in text), "bf16")
    recipe = kind
    if kind == "fp8":
        recipe = "mxfp8" if ("mx" in text and "cs" not in text) else "fp8"
        recipe = "fp8-rowwise" if "row" in text else recipe
    return kind, recipe


def read_remat(record: Mapping[str, Any], stack: Stack, params: float) -> str:
    """none, selective or full; where unsaid, what large models need under XLA and FSDP."""
    text = str((record.get("parallel") or {}).get("remat") or "").lower()
    if not text and stack.group in {"xla", "fsdp"}:
        return "full" if params > 60e9 else "selective" if params > 5e9 else "none"
    if text in {"full", "full ac", "gradient checkpointing", "true"}:
        return "full"
    if "none" in text or not text:
        return "none"
    return "selective"


def read_chip(record: Mapping[str, Any]) -> Chip:
    """The chip of a record.

    Raises:
        HardwareError: it names no chip, or one that is not known.
    """
    name = str((record.get("hardware") or {}).get("chip") or "")
    if not name:
        peak = dict((record.get("hardware") or {}).get("peak_tflops") or {}).get("bf16")
        if peak:
            return min(CHIPS.values(), key=lambda one: abs(one.peak_flops() / 1e12 - peak))
        raise HardwareError(
            f"record {record.get('id')!r} names neither hardware.chip nor its bf16 peak"
        )
    label = f"{record.get('source') or ''} {record.get('id') or ''}".lower()
    if name.lower() == "a100" and ("a100 40gb" in label or "a100_40gb" in label):
        name = "a100-40gb"
    return chip(name)


def network_bandwidth(record: Mapping[str, Any], found: Chip) -> float:
    """Bytes/s one way per chip out of a host, from the words of `hardware.interconnect`."""
    text = str((record.get("hardware") or {}).get("interconnect") or "").lower()
    if found.kind != "gpu":
        return found.network_bandwidth
    if "tcpx" in text:
        return 4 * 200e9 / 8 / 8  # GPUDirect-TCPX: four 200 Gb/s cards per host of eight
    rate = re.search(r"(?:(\d)x ?)?(?:[a-z]+ )?(\d+) ?gb/s", text)
    if rate is None:
        return found.network_bandwidth
    cards, speed = rate.groups()
    per_host = float(speed) * int(cards or 1) * 1e9 / 8
    if cards or "per node" in text or float(speed) >= 800:
        return per_host / 8
    return per_host


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else default


@dataclass(frozen=True)
class Point:
    """A record made plain."""

    id: str
    source: str
    stack: Stack
    recipe: str
    task: str
    job: Job
    kernels: str = ""


def read_point(record: Mapping[str, Any]) -> Point:
    """A record as a `Point`; see the module for what is never read.

    Args:
        record: an entry of `measured_points.json`; `measured` and `derived` may be absent.

    Raises:
        HardwareError: its chip is not known.
    """
    p = record.get("parallel") or {}
    hw = record.get("hardware") or {}
    stack, model, found = read_stack(record), read_model(record), read_chip(record)
    kind, recipe = read_precision(record)
    count = int(_number(hw.get("count"), 8))
    sequence = int(_number((record.get("model") or {}).get("seq_len"), 4096))
    tensor = int(_number(p.get("tp"), _number(p.get("ici_tp"), 1)))
    pipeline, context = int(_number(p.get("pp"), 1)), int(_number(p.get("cp"), 1))
    if not p.get("tp") and stack.group == "megatron" and model.params > 20e9:
        tensor = min(8, count)  # Megatron splits matmuls within a host first
    if "pp" not in p and stack.group in {"megatron", "megatron-old"}:
        pipeline = _needed_stages(model, found, count // tensor, tensor)
    label = str(hw.get("interconnect") or "").lower()
    if "96gb" in label and found.name == "h100":
        found = dataclasses.replace(found, memory=96e9)
    if "500w" in label and found.name == "h100":  # a power limit of 500 of 700 W costs clock speed
        found = dataclasses.replace(found, matmul=0.82 * found.matmul)
        found = dataclasses.replace(found, matmul_low=0.82 * found.matmul_low)
    found = dataclasses.replace(found, network_bandwidth=network_bandwidth(record, found))
    if tensor * pipeline * context > count:
        count = tensor * pipeline * context
    replicas = max(1.0, count / (tensor * pipeline * context))
    batch, micro = _batches(record, stack, count, sequence, replicas, pipeline)
    fsdp, zero = _sharding(p, stack, replicas, found.kind)
    slices = int(_number(p.get("dp_dcn"), _number(p.get("slices"), 1)))
    if found.kind != "tpu":
        slices = 1
    virtual = int(_number(p.get("vp"), 1))
    if stack.group == "megatron" and pipeline > 1 and "vp" not in p:
        virtual = max(1, min(4, model.layers // pipeline // 2))
    schedule = "interleaved" if virtual > 1 or "interleaved" in str(p.get("schedule")) else "1f1b"
    if schedule == "interleaved" and virtual == 1 and not p.get("vp"):
        virtual = max(1, min(4, model.layers // pipeline // 2))
    remat = read_remat(record, stack, model.params)
    task = str(p.get("task") or "pre-training")
    if "lora" in str((record.get("model") or {}).get("name") or "").lower():
        task = "lora"
    if stack.family == "megatron-lm" and "megascale" in str(record.get("id")):
        flash = True
    else:
        flash = stack.family not in _PLAIN_ATTENTION
    job = Job(
        model, found, count, sequence, micro, max(1.0, batch / (micro * replicas)), tensor,
        pipeline, context, int(_number(p.get("ep"), 1)), fsdp, zero, virtual, schedule, remat,
        kind, stack.group == "megatron" or bool(p.get("sp")) or stack.family == "torchtitan",
        slices, flash, flash or stack.group != "megatron-old", task == "lora",
        _gradient_bytes(stack, model, pipeline), "offload" in p and bool(p["offload"]),
        "offload" in str(p.get("remat")),
        runtime_bytes=_runtime_bytes(stack, model, pipeline),
        logit_bytes={"llm-foundry": 4.0, "torchtitan": 10.0}.get(stack.family, 8.0),
        tuned_attention=stack.group != "fsdp" or found.name.startswith("a100"),
    )  # fmt: skip
    source = re.sub(r" line \d+$", "", str(record.get("source") or ""))
    compiled = p.get("compile") is True or "torch.compile" in str(record.get("framework"))
    kernels = "compiled" if compiled and stack.group == "fsdp" else ""
    kernels += " async" if p.get("async_tp") is True else ""
    return Point(str(record.get("id") or ""), source, stack, recipe, task, job, kernels)


def embedding_stages(model: Model, stages: int) -> bool:
    """Whether blocks divide into stages only when the two embedding layers count as blocks."""
    return model.layers % stages != 0 and (model.layers + 2) % stages == 0


def _gradient_bytes(stack: Stack, model: Model, stages: int) -> float:
    """Bytes per parameter of gradient buffers.

    Megatron-DeepSpeed: 16-bit gradients, or, in the later runs that partition the embeddings as
    blocks, its BF16 optimizer, which adds fp32 accumulators.
    """
    if stack.family == "megatron-deepspeed":
        return 8.0 if embedding_stages(model, stages) else 2.0
    return 2.0 if stack.group in {"fsdp", "xla"} else 4.0


def _runtime_bytes(stack: Stack, model: Model, stages: int) -> float:
    """Bytes beyond the usual runtime: the earlier Megatron-DeepSpeed runs hold 11 GB more."""
    old = stack.family == "megatron-deepspeed" and not embedding_stages(model, stages)
    return 11e9 if old else 0.0


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
