"""A decoder whose MLPs are mixtures of experts: top-k routing with a fixed capacity per expert.

Design: routing is per row of the batch (a row is a group in the sense of GShard, Lepikhin et al.
2020), so an example's result does not depend on the others. `ops.dispatch_experts` brings tokens to
their experts: two all-to-alls where the experts lie on different devices.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain import ops
from shardtrain.errors import ModelError
from shardtrain.models.decoder import DecoderConfig, make_attention
from shardtrain.models.layers import RMSNorm, named


@dataclass(frozen=True)
class MoEConfig(DecoderConfig):
    """Sizes of an `MoEDecoder`; `mlp_dim` is that of one expert.

    Args:
      num_experts: Experts per block.
      experts_per_token: How many each token goes to.
      capacity_factor: Room per expert, relative to perfectly even routing. Tokens beyond it skip
        the experts of that block; the share is returned.
    """

    mlp_dim: int = 320
    num_experts: int = 8
    experts_per_token: int = 2
    capacity_factor: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tied:
            raise ModelError("MoEDecoder has an unembedding of its own: tied=True is for Decoder")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ModelError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )

    def capacity(self, length: int) -> int:
        """Tokens of one row that one expert takes."""
        return ops.capacity_of(
            length, self.experts_per_token, self.num_experts, self.capacity_factor
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where tokens go. `B` rows, `T` positions, k experts per token.

    Args:
      chosen: int `[B, T, k]`, experts, best first.
      weights: `[B, T, k]`, of each expert's result; they add up to 1.
      balance: `[B]`, 1 when experts are used evenly, more otherwise (Fedus et al. 2021, eq. 4).
    """

    chosen: jax.Array
    weights: jax.Array
    balance: jax.Array


def route(logits: jax.Array, experts_per_token: int) -> Routing:
    """Give every token its best experts.

    Args:
      logits: float `[B, T, E]`.
      experts_per_token: Choices per token, k.
    """
    experts = logits.shape[-1]
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = ops.top_experts(probs, experts_per_token)
    first = jax.nn.one_hot(chosen[..., 0], experts, dtype=jnp.float32)
    return Routing(
        chosen=chosen,
        weights=weights / jnp.sum(weights, axis=-1, keepdims=True),
        balance=experts * jnp.sum(jnp.mean(first, axis=1) * jnp.mean(probs, axis=1), axis=-1),
    )


class MoE(nnx.Module):
    """SwiGLU experts behind a learned router."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        experts, width, hidden = config.num_experts, config.embed_dim, config.mlp_dim
        init = nnx.initializers.lecun_normal(batch_axis=0)

        def weights(shape: tuple[int, ...], *names: str) -> nnx.Param:
            return nnx.Param(named(init, *names)(rngs.params(), shape))

        self.router = nnx.Linear(
            width,
            experts,
            use_bias=False,
            kernel_init=named(nnx.initializers.normal(0.02), "embed", None),
            rngs=rngs,
        )
        self.gate = weights((experts, width, hidden), "expert", "embed", "mlp")
        self.up = weights((experts, width, hidden), "expert", "embed", "mlp")
        self.down = weights((experts, hidden, width), "expert", "mlp", "embed")
        self.config = config

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`[B, T, embed]` -> the same shape; `balance` and `dropped`, `[B]` each."""
        config = self.config
        routing = route(self.router(x), config.experts_per_token)

        def experts(inside: jax.Array) -> jax.Array:
            gate = jnp.einsum("end,edf->enf", inside, self.gate[...])
            up = jnp.einsum("end,edf->enf", inside, self.up[...])
            return jnp.einsum("enf,efd->end", jax.nn.silu(gate) * up, self.down[...])

        out, dropped = ops.dispatch_experts(
            x,
            routing.chosen,
            routing.weights,
            experts,
            config.num_experts,
            config.capacity(x.shape[1]),
        )
        return out, {"balance": routing.balance, "dropped": dropped}


class MoEBlock(nnx.Module):
    """Attention and a mixture of experts, each behind a norm."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, rngs=rngs)
        self.attention = make_attention(config, rngs)
        self.moe_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, rngs=rngs)
        self.moe = MoE(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`[B, T, embed]` -> the same shape; `balance` and `dropped`, `[B]` each."""
        x = x + self.attention(self.attention_norm(x))
        mixed, stats = self.moe(self.moe_norm(x))
        return x + mixed, stats


class MoEDecoder(nnx.Module):
    """Tokens to logits; also returns what a router must be held to.

    Args:
      config: Sizes.
      rngs: Random streams.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        width, vocab = config.embed_dim, config.vocab_size
        embedding_init = named(nnx.initializers.normal(1.0), "embed_vocab", "embed")
        self.embedding = nnx.Embed(vocab, width, embedding_init=embedding_init, rngs=rngs)
        self.blocks = nnx.List([MoEBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(width, epsilon=config.norm_epsilon, rngs=rngs)
        self.unembedding = nnx.Linear(
            width,
            vocab,
            use_bias=False,
            kernel_init=named(nnx.initializers.normal(0.02), "embed", "vocab"),
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """int `[B, T]` -> logits `[B, T, vocab]`, and `balance` and `dropped`, `[B]` each.

        Add a small multiple (0.01) of `balance` to the loss; watch `dropped`.
        """
        x = self.embedding(tokens)
        found = []
        for block in self.blocks:
            x, stats = block(x)
            found.append(stats)
        mean = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *found)
        return self.unembedding(self.norm(x)), mean
