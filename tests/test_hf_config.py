"""A `config.json` as a model: what it asks for, or an error that says what is not here."""

import json
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardtrain.errors import ModelError
from shardtrain.models import MoEConfig, from_hf_config
from shardtrain.models.layers import RotaryStretch
from shardtrain.pytree import leaves_by_path

ROOT = Path(__file__).with_name("data") / "hf"

LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
QWEN2_0_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 32768,
}
QWEN3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}


def write(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        (QWEN2_0_5B, 494_032_768),
        (QWEN3_0_6B, 596_049_920),
        (GPT2, 124_439_808),
    ],
)
def test_published_sizes(config, count, tmp_path):
    """As their model cards and files count them."""
    make = from_hf_config(write(tmp_path, config))
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (LLAMA_3_8B, {"model_type": "lama"}, "did you mean 'llama'"),
        (LLAMA_3_8B, {"hidden_act": "gelu"}, r"hidden_act = 'gelu'; here: 'silu'"),
        (LLAMA_3_8B, {"mlp_bias": True}, "mlp_bias = True"),
        (LLAMA_3_8B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        (LLAMA_3_8B, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (QWEN2_0_5B, {"use_sliding_window": True}, "sliding_window = 32768"),
        (QWEN3_0_6B, {"layer_types": ["sliding_attention"]}, "only full_attention"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (GPT2, {"n_head": 7}, "num_heads=7"),
    ],
)
def test_what_is_not_here_is_refused(config, changes, said, tmp_path):
    with pytest.raises(ModelError, match=said):
        from_hf_config(write(tmp_path, config | changes))


def test_several_refusals_come_at_once(tmp_path):
    with pytest.raises(ModelError) as error:
        from_hf_config(
            write(tmp_path, GPT2 | {"activation_function": "relu", "add_cross_attention": True})
        )
    assert len(str(error.value).splitlines()) == 3


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        from_hf_config(tmp_path)


def test_fields_can_be_set_instead():
    model = nnx.eval_shape(lambda: from_hf_config(ROOT / "qwen3", num_layers=1)(nnx.Rngs(0)))
    assert len(model.blocks) == 1


def test_attention_bias_of_llama_is_on_all_four(tmp_path):
    make = from_hf_config(write(tmp_path, LLAMA_3_8B | {"attention_bias": True}))
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param))
    biases = [p for p in leaves_by_path(params) if p.startswith("blocks/0/") and p.endswith("bias")]
    assert [p.split("/")[3] for p in sorted(biases)] == ["key", "out", "query", "value"]


def test_older_files_say_the_stretch_elsewhere(tmp_path):
    config = json.loads((ROOT / "llama" / "config.json").read_text())
    old = dict(config["rope_parameters"])
    config |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": old}
    del config["rope_parameters"]
    tokens = jnp.arange(20)[None]
    run = lambda directory: from_hf_config(directory)(nnx.Rngs(0))(tokens)
    np.testing.assert_array_equal(run(write(tmp_path, config)), run(ROOT / "llama"))


def test_stretch_leaves_short_waves_and_slows_long_ones():
    stretch = RotaryStretch(factor=8.0, low=1.0, high=4.0, length=100)
    turns = np.array([8.0, 4.0, 2.5, 1.0, 0.5])  # in 100 positions
    frequency = jnp.asarray(turns * 2 * np.pi / 100)
    np.testing.assert_allclose(
        stretch(frequency) / frequency, [1, 1, (1 + 1 / 8) / 2, 1 / 8, 1 / 8], rtol=1e-6
    )


def test_a_mixture_of_experts_has_its_own_head():
    with pytest.raises(ModelError, match="tied=True is for Decoder"):
        MoEConfig(tied=True)


def test_more_tokens_than_positions():
    model = from_hf_config(ROOT / "gpt2")(nnx.Rngs(0))
    with pytest.raises(ModelError, match="33 tokens, but only 32 positions"):
        model(jnp.zeros((1, 33), jnp.int32))


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_loss_without_all_logits(family):
    model = from_hf_config(ROOT / family)(nnx.Rngs(0))
    tokens = jnp.arange(16).reshape(2, 8)
    logits = jax.nn.log_softmax(model(tokens))
    wanted = -jnp.take_along_axis(logits, tokens[..., None], -1).mean()
    np.testing.assert_allclose(model.nats(tokens, tokens).value, wanted, rtol=1e-5)
