"""Makes the checkpoints and logits beside this file: `python make_goldens.py`.

Needs torch and transformers, which the tests do not. Seen with torch 2.13.0, transformers 5.23.0.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def models():
    """Name, model, dtype of the file, bytes per file."""
    llama = LlamaConfig(**SIZES, head_dim=16, rms_norm_eps=1e-5, rope_parameters=STRETCHED)
    yield "llama", LlamaForCausalLM(llama), torch.float32, "50KB"
    qwen2 = Qwen2Config(**SIZES, tie_word_embeddings=True)
    yield "qwen2", Qwen2ForCausalLM(qwen2), torch.bfloat16, "1GB"
    qwen3 = Qwen3Config(**SIZES, head_dim=16, rope_theta=1_000_000.0)
    yield "qwen3", Qwen3ForCausalLM(qwen3), torch.float32, "1GB"
    gpt2 = GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    yield "gpt2", GPT2LMHeadModel(gpt2), torch.float32, "1GB"


@torch.no_grad()
def randomise(model, generator):
    """Every parameter away from the zeros and ones that would hide a mistake."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_scale = "norm" in name or "ln_" in name
            parameter.copy_(0.1 * noise + (1 if is_scale and name.endswith("weight") else 0))
        else:
            parameter.copy_(noise / 32**0.5)


@torch.no_grad()
def main():
    for index, (name, model, dtype, size) in enumerate(models()):
        generator = torch.Generator().manual_seed(index)
        randomise(model, generator)
        model = model.eval().to(dtype)
        model.save_pretrained(HERE / name, max_shard_size=size)
        (HERE / name / "generation_config.json").unlink()
        tokens = torch.randint(0, model.config.vocab_size, (8, 24), generator=generator)
        # As a user reads it: `.to(dtype)` also rounded what is not saved (the rotary frequencies).
        again = type(model).from_pretrained(HERE / name, dtype=torch.float32).eval()
        logits = again(tokens).logits
        values = {"tokens": tokens.to(torch.int32), "logits": logits.contiguous()}
        save_file(values, HERE / name / "golden.safetensors")
        print(name, float(logits.std()), float(logits.abs().max()))


if __name__ == "__main__":
    main()
