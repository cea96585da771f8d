"""Which tensor of a Hugging Face checkpoint is which parameter of the models in `models`: data.

A key is the name of a tensor, `*` standing for one part of it (a layer's number). A value is a
path, or `(path or paths, *what is done)`; see `mapping.parse`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from shardtrain.errors import CheckpointError, suggest

_LAYER = "model.layers.*"
_ATTENTION = f"{_LAYER}.self_attn"

DECODER = {
    "model.embed_tokens.weight": "embedding/embedding",
    f"{_LAYER}.input_layernorm.weight": "blocks/*/attention_norm/scale",
    f"{_ATTENTION}.q_proj.weight": ("blocks/*/attention/query/kernel", "transpose"),
    f"{_ATTENTION}.k_proj.weight": ("blocks/*/attention/key/kernel", "transpose"),
    f"{_ATTENTION}.v_proj.weight": ("blocks/*/attention/value/kernel", "transpose"),
    f"{_ATTENTION}.o_proj.weight": ("blocks/*/attention/out/kernel", "transpose"),
    f"{_ATTENTION}.q_proj.bias": "blocks/*/attention/query/bias",
    f"{_ATTENTION}.k_proj.bias": "blocks/*/attention/key/bias",
    f"{_ATTENTION}.v_proj.bias": "blocks/*/attention/value/bias",
    f"{_ATTENTION}.o_proj.bias": "blocks/*/attention/out/bias",
    f"{_ATTENTION}.q_norm.weight": "blocks/*/attention/query_norm/scale",
    f"{_ATTENTION}.k_norm.weight": "blocks/*/attention/key_norm/scale",
    f"{_ATTENTION}.rotary_emb.inv_freq": None,
    f"{_LAYER}.post_attention_layernorm.weight": "blocks/*/mlp_norm/scale",
    f"{_LAYER}.mlp.gate_proj.weight": ("blocks/*/mlp/gate/kernel", "transpose"),
    f"{_LAYER}.mlp.up_proj.weight": ("blocks/*/mlp/up/kernel", "transpose"),
    f"{_LAYER}.mlp.down_proj.weight": ("blocks/*/mlp/down/kernel", "transpose"),
    "model.norm.weight": "norm/scale",
}
"""Llama, Qwen2, Qwen3; what a family does not have matches nothing."""

_QKV = [f"blocks/*/attention/{name}" for name in ("query", "key", "value")]

GPT2 = {
    "wte.weight": "embedding/embedding",
    "wpe.weight": "positions/embedding",
    "h.*.ln_1.weight": "blocks/*/attention_norm/scale",
    "h.*.ln_1.bias": "blocks/*/attention_norm/bias",
    "h.*.attn.c_attn.weight": (tuple(f"{p}/kernel" for p in _QKV),),
    "h.*.attn.c_attn.bias": (tuple(f"{p}/bias" for p in _QKV),),
    "h.*.attn.c_proj.weight": "blocks/*/attention/out/kernel",
    "h.*.attn.c_proj.bias": "blocks/*/attention/out/bias",
    "h.*.attn.bias": None,  # the causal mask
    "h.*.attn.masked_bias": None,
    "h.*.ln_2.weight": "blocks/*/mlp_norm/scale",
    "h.*.ln_2.bias": "blocks/*/mlp_norm/bias",
    "h.*.mlp.c_fc.weight": "blocks/*/mlp/up/kernel",
    "h.*.mlp.c_fc.bias": "blocks/*/mlp/up/bias",
    "h.*.mlp.c_proj.weight": "blocks/*/mlp/down/kernel",
    "h.*.mlp.c_proj.bias": "blocks/*/mlp/down/bias",
    "ln_f.weight": "norm/scale",
    "ln_f.bias": "norm/bias",
}
"""Its projections are stored as `[in, out]`, so nothing is transposed. Files written with the head
call all but the head `transformer.` and so on."""

_FAMILIES: dict[str, Mapping[str, Any]] = {
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER,
    "gpt2": GPT2,
}


def family_mapping(
    model_type: str | None, tensors: Iterable[str], paths: Iterable[str]
) -> dict[str, Any]:
    """The table of a family, as this file and this model have it.

    Args:
      model_type: As in `config.json`.
      tensors: Names in the file.
      paths: Parameter paths of the model.

    Raises:
      CheckpointError: There is no table for this family.
    """
    if model_type not in _FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r}: there is no table of its names; "
            f"{suggest(str(model_type), _FAMILIES)}. Pass mapping={{tensor name: parameter path}}"
        )
    prefix = "transformer." if any(t.startswith("transformer.") for t in tensors) else ""
    table = {prefix + name: rule for name, rule in _FAMILIES[model_type].items()}
    tied = "unembedding/kernel" not in set(paths)
    head = "embedding/embedding" if tied else ("unembedding/kernel", "transpose")
    return {**table, "lm_head.weight": head}
