"""Decoders in NNX: GPT with tied embeddings and dropout, Llama, mixture of experts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardtrain as st
from zoo.case import LENGTH, VOCAB, Case, tokens


class GPTBlock(nnx.Module):
    def __init__(self, width, heads, dropout, *, rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.reshape(batch, length, width)))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class GPT(nnx.Module):
    def __init__(self, *, dropout=0.1, rngs):
        self.embed = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, 16, rngs=rngs)
        self.blocks = nnx.List([GPTBlock(16, 4, dropout, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.positions(jnp.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def rotate(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 100 ** (jnp.arange(half) / half)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class LlamaBlock(nnx.Module):
    def __init__(self, width, heads, kv_heads, *, rngs):
        dim = width // heads
        bare = lambda *shape: nnx.LinearGeneral(*shape, use_bias=False, rngs=rngs)
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.q, self.k = bare(width, (heads, dim)), bare(width, (kv_heads, dim))
        self.v = bare(width, (kv_heads, dim))
        self.o = nnx.LinearGeneral((heads, dim), width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.gate, self.up = bare(width, 32), bare(width, 32)
        self.down = bare(32, width)

    def __call__(self, x):
        y = self.norm1(x)
        q, k, v = rotate(self.q(y)), rotate(self.k(y)), self.v(y)
        x = x + self.o(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.layers = nnx.List([LlamaBlock(16, 4, 2, rngs=rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class MoE(nnx.Module):
    """Every expert computes every token; a top-2 router weighs them (Mixtral, dense dispatch)."""

    def __init__(self, *, rngs):
        init = nnx.initializers.lecun_normal()
        self.embed = nnx.Embed(VOCAB, 16, rngs=rngs)
        self.router = nnx.Linear(16, 4, use_bias=False, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (4, 16, 32)))
        self.down = nnx.Param(init(rngs.params(), (4, 32, 16)))
        self.head = nnx.Linear(16, VOCAB, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        scores, chosen = jax.lax.top_k(self.router(x), 2)
        gates = jnp.sum(jax.nn.one_hot(chosen, 4) * jax.nn.softmax(scores)[..., None], axis=-2)
        hidden = nnx.silu(jnp.einsum("bsd,edf->bsef", x, self.up[...]))
        y = jnp.einsum("bsef,efd,bse->bsd", hidden, self.down[...], gates)
        return self.head(x + y)


def next_token(model, batch):
    logits = model(batch["tokens"][:, :-1])
    return st.cross_entropy(logits, batch["tokens"][:, 1:], batch["mask"][:, 1:])


def given_targets(model, batch):
    """Inputs and targets of one length, which `context` and `tensor` divide."""
    return st.cross_entropy(model(batch["tokens"]), batch["targets"], batch["mask"])


def shifted(rows, seed=0):
    batch = tokens(rows, seed)
    return {**batch, "targets": np.roll(batch["tokens"], -1, axis=1)}


CASES = (
    Case("gpt", lambda: lambda rngs: GPT(rngs=rngs), next_token, tokens, splits=False),
    Case("llama", lambda: lambda rngs: Llama(rngs=rngs), next_token, tokens),
    Case("moe", lambda: lambda rngs: MoE(rngs=rngs), next_token, tokens),
    Case("gpt-targets", lambda: lambda rngs: GPT(rngs=rngs), given_targets, shifted, splits=False),
    Case("llama-targets", lambda: lambda rngs: Llama(rngs=rngs), given_targets, shifted),
    Case("moe-targets", lambda: lambda rngs: MoE(rngs=rngs), given_targets, shifted),
)
