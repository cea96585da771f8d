"""A Hugging Face `config.json` as one of our models: Llama, Qwen2, Qwen3 and GPT-2.

Design: what a config asks for and the model would not do is refused by name, so that logits are
those of the checkpoint or there is an error.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from shardtrain.errors import ModelError, suggest
from shardtrain.models.decoder import Decoder, DecoderConfig
from shardtrain.models.gpt2 import GPT2, GPT2Config
from shardtrain.models.layers import RotaryStretch

_DECODER_ONLY = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_GPT2_ONLY = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
"""Field -> the values that the model here implements (`reorder_and_upcast_attn` changes no number
in float32); a field that is absent has the first."""


def from_hf_config(
    path: str | os.PathLike[str], **changes: Any
) -> Callable[[nnx.Rngs], Decoder | GPT2]:
    """The model of a `config.json`, as a factory for `st.plan`; it has no weights yet.

    The models here have no dropout: dropout rates in a config are not used.

    Args:
      path: The file, or the directory of a checkpoint.
      changes: Fields of `DecoderConfig` or `GPT2Config` to set instead, e.g. `attention="auto"`.

    Raises:
      ModelError: Another family, or an option that the model here does not have.

    Example:
      >>> from pathlib import Path
      >>> file = Path("tests/data/hf/gpt2")
      >>> if file.exists():
      ...     model = from_hf_config(file)(nnx.Rngs(0))
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        given = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}") from error
    kind = given.get("model_type")
    if kind not in _FAMILIES:
        raise ModelError(
            f"{file}: model_type {kind!r} is not here; {suggest(str(kind), _FAMILIES)}"
        )
    module, read = _FAMILIES[kind]
    config = dataclasses.replace(read(given, str(file)), **changes)
    return lambda rngs: module(config, rngs=rngs)


def _decoder(given: Mapping[str, Any], where: str) -> DecoderConfig:
    kind, layers = given["model_type"], given["num_hidden_layers"]
    _refuse(_without_unused_window(given), _DECODER_ONLY, where)
    if set(given.get("layer_types") or ()) - {"full_attention"}:
        raise ModelError(
            f"{where}: layer_types {given['layer_types']}: only full_attention is here"
        )
    theta, stretch = _rotary(given, where)
    bias = bool(given.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=given["vocab_size"],
        num_layers=layers,
        embed_dim=given["hidden_size"],
        num_heads=given["num_attention_heads"],
        num_kv_heads=given.get("num_key_value_heads") or given["num_attention_heads"],
        head_dim=given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
        mlp_dim=given["intermediate_size"],
        rope_theta=theta,
        rope_stretch=stretch,
        norm_epsilon=given["rms_norm_eps"],
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        qk_norm=kind == "qwen3",
        tied=bool(given.get("tie_word_embeddings", False)),
    )


def _gpt2(given: Mapping[str, Any], where: str) -> GPT2Config:
    _refuse(given, _GPT2_ONLY, where)
    return GPT2Config(
        vocab_size=given["vocab_size"],
        num_layers=given["n_layer"],
        embed_dim=given["n_embd"],
        num_heads=given["n_head"],
        mlp_dim=given.get("n_inner") or 4 * given["n_embd"],
        max_length=given["n_positions"],
        norm_epsilon=given["layer_norm_epsilon"],
        tied=bool(given.get("tie_word_embeddings", True)),
    )


_FAMILIES: dict[str, tuple[Any, Callable[[Mapping[str, Any], str], Any]]] = {
    "llama": (Decoder, _decoder),
    "qwen2": (Decoder, _decoder),
    "qwen3": (Decoder, _decoder),
    "gpt2": (GPT2, _gpt2),
}


def _without_unused_window(given: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen writes the size of a window also where it is not used."""
    if given.get("use_sliding_window") is False:
        return {k: v for k, v in given.items() if k != "sliding_window"}
    return dict(given)


def _refuse(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    wrong = [
        f"  {name} = {given[name]!r}; here: {', '.join(map(repr, values))}"
        for name, values in allowed.items()
        if given.get(name, values[0]) not in values
    ]
    if wrong:
        raise ModelError(f"{where} asks for what the model here does not do:\n" + "\n".join(wrong))


def _rotary(given: Mapping[str, Any], where: str) -> tuple[float, RotaryStretch | None]:
    """Base and stretch; newer files have both in `rope_parameters`, older ones in two fields."""
    found = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = float(found.get("rope_theta") or given.get("rope_theta") or 10_000.0)
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(f"{where}: rope_type {kind!r} is not here; known: 'default', 'llama3'")
    return theta, RotaryStretch(
        factor=found["factor"],
        low=found["low_freq_factor"],
        high=found["high_freq_factor"],
        length=found["original_max_position_embeddings"],
    )
