"""An encoder-decoder with cross-attention in Linen (T5 style: shared embedding, no biases)."""

import flax.linen as nn
import numpy as np

import shardtrain as st
from zoo.case import LENGTH, VOCAB, Case, tokens


class Block(nn.Module):
    cross: bool

    @nn.compact
    def __call__(self, x, mask, memory=None, memory_mask=None):
        attend = lambda name: nn.MultiHeadDotProductAttention(
            num_heads=2, use_bias=False, name=name
        )
        y = nn.RMSNorm()(x)
        x = x + attend("self_attention")(y, y, mask=mask)
        if self.cross:
            x = x + attend("cross_attention")(nn.RMSNorm()(x), memory, mask=memory_mask)
        y = nn.Dense(32, use_bias=False)(nn.RMSNorm()(x))
        return x + nn.Dense(16, use_bias=False)(nn.relu(y))


class EncoderDecoder(nn.Module):
    def setup(self):
        self.embed = nn.Embed(VOCAB, 16)
        self.encoder = Block(cross=False)
        self.decoder = Block(cross=True)
        self.norm = nn.RMSNorm()

    def encode(self, source, present):
        return self.encoder(self.embed(source), nn.make_attention_mask(present, present))

    def __call__(self, source, present, target):
        memory = self.encode(source, present)
        every = nn.make_attention_mask(target >= 0, present)
        x = self.decoder(self.embed(target), nn.make_causal_mask(target), memory, every)
        return self.embed.attend(self.norm(x)) / 4.0


def batch(rows, seed=0):
    made = tokens(rows, seed)
    rng = np.random.default_rng(seed + 1)
    made["source"] = rng.integers(0, VOCAB, (rows, LENGTH - 2)).astype(np.int32)
    made["present"] = np.arange(LENGTH - 2)[None] < rng.integers(1, LENGTH - 2, rows)[:, None]
    return made


def loss(model, batch):
    logits = model(batch["source"], batch["present"], batch["tokens"][:, :-1])
    return st.cross_entropy(logits, batch["tokens"][:, 1:], batch["mask"][:, 1:])


CASES = (Case("encoder-decoder", EncoderDecoder, loss, batch),)
