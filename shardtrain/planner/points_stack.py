"""Which software ran a published run, and what it is known to do."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardtrain.planner.catalogue import Model


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

PLAIN_ATTENTION = {"megatron-deepspeed", "megatron-ptdp", "pax", "levanter", "alpa", "megatron-lm"}


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


def embedding_stages(model: Model, stages: int) -> bool:
    """Whether blocks divide into stages only when the two embedding layers count as blocks."""
    return model.layers % stages != 0 and (model.layers + 2) % stages == 0


def gradient_bytes(stack: Stack, model: Model, stages: int) -> float:
    """Bytes per parameter of gradient buffers.

    Megatron-DeepSpeed: 16-bit gradients, or, in the later runs that partition the embeddings as
    blocks, its BF16 optimizer, which adds fp32 accumulators.
    """
    if stack.family == "megatron-deepspeed":
        return 8.0 if embedding_stages(model, stages) else 2.0
    return 2.0 if stack.group in {"fsdp", "xla"} else 4.0


def runtime_bytes(stack: Stack, model: Model, stages: int) -> float:
    """Bytes beyond the usual runtime: the earlier Megatron-DeepSpeed runs hold 11 GB more."""
    old = stack.family == "megatron-deepspeed" and not embedding_stages(model, stages)
    return 11e9 if old else 0.0
