"""GPT-2: learned positions, layer norms, biases everywhere, the embedding as its own head.

Source: Radford et al. 2019; the sizes that vary are those of the published checkpoints.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain import ops
from shardtrain.errors import ModelError
from shardtrain.models.decoder import make_unembedding
from shardtrain.models.layers import Attention, named
from shardtrain.modules import Mean


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a `GPT2`; the default is the smallest published one, 124 million parameters.

    Args:
      vocab_size: Token ids are smaller than this.
      num_layers: Blocks.
      embed_dim: Width of the residual stream.
      num_heads: Heads; divides `embed_dim`.
      mlp_dim: Width inside the MLP.
      max_length: Positions that have an embedding.
      norm_epsilon: Added to the variance in norms.
      tied: Whether the head is the embedding.

    Raises:
      ModelError: The width is not divisible by the heads.
    """

    vocab_size: int = 50_257
    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 1024
    norm_epsilon: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ModelError(
                f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}"
            )


def _norm(config: GPT2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    init = nnx.initializers
    return nnx.LayerNorm(
        config.embed_dim,
        epsilon=config.norm_epsilon,
        scale_init=named(init.ones, "embed"),
        bias_init=named(init.zeros, "embed"),
        rngs=rngs,
    )


class MLP(nnx.Module):
    """`down(gelu(up(x)))`, the gelu approximated by tanh."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, *names: str) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                kernel_init=named(nnx.initializers.normal(0.02), *names),
                bias_init=named(nnx.initializers.zeros, names[1]),
                rngs=rngs,
            )

        self.up = linear(config.embed_dim, config.mlp_dim, "embed", "mlp")
        self.down = linear(config.mlp_dim, config.embed_dim, "mlp", "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., embed]` -> the same shape."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class GPT2Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        heads = config.num_heads
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(
            config.embed_dim,
            heads,
            heads,
            config.embed_dim // heads,
            rope_theta=None,
            qkv_bias=True,
            out_bias=True,
            rngs=rngs,
        )
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, embed]` -> the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT2(nnx.Module):
    """Tokens to logits of the next token.

    Args:
      config: Sizes.
      rngs: Random streams.

    Example:
      >>> config = GPT2Config(vocab_size=61, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)
      >>> GPT2(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 5), jnp.int32)).shape
      (2, 5, 61)
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        table = partial(nnx.Embed, features=config.embed_dim, rngs=rngs)
        self.embedding = table(
            config.vocab_size, embedding_init=named(init, "embed_vocab", "embed")
        )
        self.positions = table(config.max_length, embedding_init=named(init, "positions", "embed"))
        self.blocks = nnx.List([GPT2Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        head = partial(make_unembedding, config.embed_dim, config.vocab_size, rngs)
        self.unembedding = None if config.tied else head()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int `[B, T]` -> logits `[B, T, vocab]`."""
        hidden = self.hidden(tokens)
        if self.unembedding is None:
            return self.embedding.attend(hidden)
        return self.unembedding(hidden)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """int `[B, T]` -> `[B, T, embed]`, what the logits are made of."""
        length, most = tokens.shape[1], self.positions.num_embeddings
        if length > most:
            raise ModelError(f"{length} tokens, but only {most} positions have an embedding")
        x = self.embedding(tokens) + self.positions(jnp.arange(length))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def nats(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        mask: jax.Array | None = None,
        num_chunks: int = 8,
    ) -> Mean:
        """The cross-entropy of `targets`, without ever having all logits; see `Decoder.nats`."""
        if self.unembedding is None:
            kernel = self.embedding.embedding[...].T
        else:
            kernel = self.unembedding.kernel[...]
        hidden = self.hidden(tokens).astype(kernel.dtype)
        return ops.chunked_cross_entropy(hidden, kernel, targets, mask, num_chunks=num_chunks)
