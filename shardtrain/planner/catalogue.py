"""Transformer descriptions with exact parameter counts: enough to plan without the code.

A `Model` is a shape, not a program. Counts follow from it in closed form and reproduce the
published numbers to the digit (tests/test_planner_catalogue.py).
"""

import dataclasses

from shardtrain.errors import ModelError, suggest
from shardtrain.planner.catalogue_model import Latent, Model

__all__ = ["CATALOGUE", "Latent", "Model", "get", "variant"]


def _gpt(name: str, layers: int, d: int, heads: int, vocab: int = 50257, seq: int = 1024,
         source: str = "openai/gpt-2 hparams") -> Model:  # fmt: skip
    return Model(name, layers, d, heads, heads, d // heads, 4 * d, vocab, 2, True, "layer", True,
                 seq, source=source)  # fmt: skip


def _llama(name: str, layers: int, d: int, heads: int, kv: int, ff: int, vocab: int,
           source: str) -> Model:  # fmt: skip
    return Model(name, layers, d, heads, kv, 128, ff, vocab, source=source)


def _qwen_moe(name: str, layers: int, d: int, heads: int, ff: int) -> Model:
    return Model(name, layers, d, heads, 4, 128, 0, 151936, qk_norm=True, experts=128, top_k=8,
                 expert_ff=ff, source="arXiv:2505.09388 and config.json")  # fmt: skip


def _oss(name: str, layers: int, experts: int) -> Model:
    return Model(name, layers, 2880, 64, 8, 64, 0, 201088, bias=True, sinks=True, experts=experts,
                 top_k=4, expert_ff=2880, expert_bias=True, window=128, window_layers=layers // 2,
                 source="arXiv:2508.10925 and config.json")  # fmt: skip


def _deepseek(name: str, heads: int, experts: int, dense: int, vocab: int, source: str,
              mtp: int = 0) -> Model:  # fmt: skip
    return Model(name, 61, 7168, heads, heads, 128, 18432, vocab, experts=experts, top_k=8,
                 expert_ff=2048, shared_ff=2048, moe_layers=61 - dense, router_bias=True,
                 latent=Latent(1536, 512, 128, 64, 128), mtp=mtp, source=source)  # fmt: skip


def _hybrid(name: str, counts: tuple[int, int, int], d: int, heads: int, experts: int, top_k: int,
            ff: int, shared: int, mamba: int, latent: int, source: str) -> Model:  # fmt: skip
    attention, mixtures, mambas = counts
    return Model(name, sum(counts), d, heads, 2, 128, 0, 131072, 2, experts=experts, top_k=top_k,
                 expert_ff=ff, shared_ff=shared, moe_layers=mixtures, expert_latent=latent,
                 attention_layers=attention, mamba_layers=mambas, mamba_params=mamba,
                 router_bias=True, source=source)  # fmt: skip


def _llama4(name: str, experts: int, mixtures: int) -> Model:
    return Model(name, 48, 5120, 40, 8, 128, 16384, 202048, experts=experts, top_k=1,
                 expert_ff=8192, shared_ff=8192, moe_layers=mixtures, window=8192,
                 window_layers=36, source="meta-llama/llama-models llama4 config")  # fmt: skip


def _vit(name: str, layers: int, d: int, heads: int, ff: int) -> Model:
    return Model(name, layers, d, heads, heads, d // heads, ff, 0, 2, False, "layer", True, 257,
                 patch=14 * 14 * 3 * d + 2 * d, source="arXiv:2106.04560 Table 2")  # fmt: skip


_L2, _L3 = "arXiv:2307.09288 and params.json", "arXiv:2407.21783 Table 3"
_GPT3 = "arXiv:2005.14165 Table 2.1"

_MODELS = (
    _gpt("gpt2-124m", 12, 768, 12),
    _gpt("gpt2-355m", 24, 1024, 16),
    _gpt("gpt2-774m", 36, 1280, 20),
    _gpt("gpt2-1.5b", 48, 1600, 25),
    _gpt("gpt3-1.3b", 24, 2048, 16, seq=2048, source=_GPT3),
    _gpt("gpt3-2.7b", 32, 2560, 32, seq=2048, source=_GPT3),
    _gpt("gpt3-6.7b", 32, 4096, 32, seq=2048, source=_GPT3),
    _gpt("gpt3-13b", 40, 5120, 40, seq=2048, source=_GPT3),
    _gpt("gpt3-175b", 96, 12288, 96, seq=2048, source=_GPT3),
    _llama("llama2-7b", 32, 4096, 32, 32, 11008, 32000, _L2),
    _llama("llama2-13b", 40, 5120, 40, 40, 13824, 32000, _L2),
    _llama("llama2-34b", 48, 8192, 64, 8, 22016, 32000, _L2),
    _llama("llama2-70b", 80, 8192, 64, 8, 28672, 32000, _L2),
    _llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256, _L3),
    _llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256, _L3),
    _llama("llama3-405b", 126, 16384, 128, 8, 53248, 128256, _L3),
    Model("mixtral-8x7b", 32, 4096, 32, 8, 128, 0, 32000, experts=8, top_k=2, expert_ff=14336,
          source="arXiv:2401.04088"),
    Model("mixtral-8x22b", 56, 6144, 48, 8, 128, 0, 32768, experts=8, top_k=2, expert_ff=16384,
          source="mistralai/Mixtral-8x22B-v0.3 config.json"),
    _deepseek("deepseek-v3", 128, 256, 3, 129280, "arXiv:2412.19437 and config.json"),
    _deepseek("kimi-k2", 64, 384, 1, 163840, "moonshotai/Kimi-K2 config.json"),
    _qwen_moe("qwen3-30b-a3b", 48, 2048, 32, 768),
    _qwen_moe("qwen3-235b-a22b", 94, 4096, 64, 1536),
    Model("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True, source="arXiv:2505.09388"),
    Model("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936, qk_norm=True,
          source="arXiv:2505.09388"),
    _oss("gpt-oss-20b", 24, 32),
    _oss("gpt-oss-120b", 36, 128),
    _llama4("llama4-scout-17b-16e", 16, 48),
    _llama4("llama4-maverick-17b-128e", 128, 24),
    _hybrid("nemotron-3-nano", (6, 23, 23), 2688, 32, 128, 6, 1856, 3712, 38_707_200, 0,
            "arXiv:2512.20848"),
    _hybrid("nemotron-3-super", (8, 40, 40), 4096, 32, 512, 22, 2688, 5376, 109_576_192, 1024,
            "nvidia/Nemotron-3-Super-120B-A12B config.json"),
    Model("nemotron-4-15b", 32, 6144, 48, 8, 128, 24576, 256000, 2, source="arXiv:2402.16819"),
    Model("nemotron-4-340b", 96, 18432, 96, 8, 192, 73728, 256000, 2, source="arXiv:2406.11704"),
    Model("gemma-2b", 18, 2048, 8, 1, 256, 16384, 256000, tied=True, source="arXiv:2403.08295"),
    Model("gemma-7b", 28, 3072, 16, 16, 256, 24576, 256000, tied=True, source="arXiv:2403.08295"),
    Model("gemma2-9b", 42, 3584, 16, 8, 256, 14336, 256000, tied=True, block_norms=4, window=4096,
          window_layers=21, source="arXiv:2408.00118"),
    Model("gemma2-27b", 46, 4608, 32, 16, 128, 36864, 256000, tied=True, block_norms=4, window=4096,
          window_layers=23, source="arXiv:2408.00118"),
    Model("gemma3-4b", 34, 2560, 8, 4, 256, 10240, 262144, tied=True, block_norms=4,
          qk_norm=True, window=1024,
          window_layers=29, source="arXiv:2503.19786"),
    Model("gemma3-12b", 48, 3840, 16, 8, 256, 15360, 262144, tied=True, block_norms=4,
          qk_norm=True, window=1024,
          window_layers=40, source="arXiv:2503.19786"),
    Model("gemma3-27b", 62, 5376, 32, 16, 128, 21504, 262144, tied=True, block_norms=4,
          qk_norm=True, window=1024, window_layers=52, source="arXiv:2503.19786"),
    _vit("vit-g", 40, 1408, 16, 6144),
    _vit("vit-G", 48, 1664, 16, 8192),
)  # fmt: skip

CATALOGUE = {model.name: model for model in _MODELS}

_ALIASES = {
    "llama3.1-405b": "llama3-405b", "llama3.1-70b": "llama3-70b", "llama3.1-8b": "llama3-8b",
    "gpt2": "gpt2-124m", "gpt2-medium": "gpt2-355m", "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1.5b", "gpt2-1558m": "gpt2-1.5b", "deepseek-v3-671b": "deepseek-v3",
}  # fmt: skip


def get(name: str) -> Model:
    """The model of that name.

    Args:
        name: for example "llama3-8b".

    Raises:
        ModelError: the name is not in the catalogue; the nearest is suggested.

    Example:
        >>> get("llama3-8b").params
        8030261248
    """
    key = name if name in CATALOGUE else _ALIASES.get(name.lower(), name.lower())
    if key not in CATALOGUE:
        raise ModelError(f"model {name!r} is not in the catalogue; {suggest(key, CATALOGUE)}")
    return CATALOGUE[key]


def variant(name: str, **changes: object) -> Model:
    """A catalogue model with some fields changed (vocabulary padding, fewer layers)."""
    return dataclasses.replace(get(name), **changes)
