"""A decoder language model: pre-norm blocks of grouped-query attention and SwiGLU."""

from dataclasses import dataclass

import jax
from flax import nnx

from shardtrain import ops
from shardtrain.errors import ModelError
from shardtrain.models.layers import Attention, RMSNorm, RotaryStretch, SwiGLU, named
from shardtrain.modules import Mean


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`; the default has 2.9 million parameters.

    Args:
      vocab_size: Token ids are smaller than this.
      num_layers: Blocks.
      embed_dim: Width of the residual stream.
      num_heads: Query heads.
      num_kv_heads: Key/value heads; divides `num_heads`.
      head_dim: Width of a head, even.
      mlp_dim: Width inside SwiGLU.
      rope_theta: Base of the rotary position.
      rope_stretch: How its waves are stretched; None: they stay.
      norm_epsilon: Added to the mean square in norms.
      qkv_bias: Whether queries, keys and values have a bias.
      out_bias: Whether the output of attention has one.
      qk_norm: Whether each query and key is normed.
      tied: Whether the unembedding is the embedding.
      attention: "einsum" (written out, for any layout), or an implementation of `ops.attention`:
        "auto", "ring" (over `context`), "cudnn", "xla".

    Raises:
      ModelError: Heads cannot be grouped or rotated.
    """

    vocab_size: int = 256
    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 640
    rope_theta: float = 10_000.0
    rope_stretch: RotaryStretch | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    attention: str = "einsum"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}: "
                "each key/value head serves a whole number of query heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} is odd; rotary position turns pairs")


def make_attention(config: DecoderConfig, rngs: nnx.Rngs) -> Attention:
    """The attention layer of a block."""
    return Attention(
        config.embed_dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        rope_theta=config.rope_theta,
        rope_stretch=config.rope_stretch,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm=config.norm_epsilon if config.qk_norm else None,
        implementation=config.attention,
        rngs=rngs,
    )


class Block(nnx.Module):
    """One layer: attention and SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, rngs=rngs)
        self.attention = make_attention(config, rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, rngs=rngs)
        self.mlp = SwiGLU(config.embed_dim, config.mlp_dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, embed]` -> `[B, T, embed]`."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def make_unembedding(embed_dim: int, vocab_size: int, rngs: nnx.Rngs) -> nnx.Linear:
    """From the residual stream to logits."""
    kernel_init = named(nnx.initializers.normal(0.02), "embed", "vocab")
    return nnx.Linear(embed_dim, vocab_size, use_bias=False, kernel_init=kernel_init, rngs=rngs)


class Decoder(nnx.Module):
    """Tokens to logits of the next token.

    Args:
      config: Sizes.
      rngs: Random streams.

    Example:
      >>> import jax.numpy as jnp
      >>> config = DecoderConfig(num_layers=1, embed_dim=8, head_dim=2, mlp_dim=16)
      >>> Decoder(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 5), jnp.int32)).shape
      (2, 5, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width, vocab = config.embed_dim, config.vocab_size
        self.embedding = nnx.Embed(
            vocab,
            width,
            # A table that is also the head has its deviation, and makes logits of the same size.
            embedding_init=named(
                nnx.initializers.normal(0.02 if config.tied else 1.0), "embed_vocab", "embed"
            ),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(width, epsilon=config.norm_epsilon, rngs=rngs)
        self.unembedding = None if config.tied else make_unembedding(width, vocab, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int `[B, T]` -> logits `[B, T, vocab]`."""
        hidden = self.hidden(tokens)
        if self.unembedding is None:
            return self.embedding.attend(hidden)
        return self.unembedding(hidden)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """int `[B, T]` -> `[B, T, embed]`, what the logits are made of."""
        x = self.embedding(tokens)
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
        """The cross-entropy of `targets`, without ever having all logits.

        Args:
          tokens: int `[B, T]`.
          targets: int `[B, T]`.
          mask: `[B, T]` weights, or None.
          num_chunks: Parts of the sequence whose logits exist one at a time.
        """
        if self.unembedding is None:
            kernel = self.embedding.embedding[...].T
        else:
            kernel = self.unembedding.kernel[...]
        hidden = self.hidden(tokens).astype(kernel.dtype)
        return ops.chunked_cross_entropy(hidden, kernel, targets, mask, num_chunks=num_chunks)
