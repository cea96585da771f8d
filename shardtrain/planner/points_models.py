"""Which model a published run trained: its printed dims, the catalogue, or a shape of that size."""

import re
from collections.abc import Mapping
from typing import Any

from shardtrain.planner.catalogue import CATALOGUE, Model, get, variant
from shardtrain.planner.points_stack import read_stack


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
