"""The decoder of `shardtrain.models` in PyTorch: same shapes, same initial weights."""

import torch
from torch import nn
from torch.nn import functional


def rotary(x, theta):
    """`[B, T, heads, head_dim]`: the two halves of the head are turned against each other."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = (torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequency)[None, :, None]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width, head = config.embed_dim, config.head_dim
        self.query = nn.Linear(width, config.num_heads * head, bias=False)
        self.key = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.value = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.out = nn.Linear(config.num_heads * head, width, bias=False)

    def forward(self, x):
        rows, length, _ = x.shape
        split = lambda y: y.view(rows, length, -1, self.config.head_dim)
        query = rotary(split(self.query(x)), self.config.rope_theta).transpose(1, 2)
        key = rotary(split(self.key(x)), self.config.rope_theta).transpose(1, 2)
        value = split(self.value(x)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return self.out(mixed.transpose(1, 2).reshape(rows, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.embed_dim, config.mlp_dim, bias=False)
        self.up = nn.Linear(config.embed_dim, config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, config.embed_dim, bias=False)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)
        self.mlp = SwiGLU(config)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)
        self.unembedding = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        load(self, config.weights)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembedding(self.norm(x))


def load(model, weights):
    """Flax's values: `weights` maps "blocks/0/mlp/up/kernel" to an array, its inputs first."""
    with torch.no_grad():
        for path, values in weights.items():
            parts = path.split("/")
            owner = model.get_submodule(".".join(parts[:-1]))
            values = torch.from_numpy(values)
            if parts[-1] == "kernel":
                values = values.reshape(owner.in_features, owner.out_features).T
            owner.weight.copy_(values)
