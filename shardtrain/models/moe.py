"""A decoder whose MLPs are mixtures of experts: top-k routing with a fixed capacity per expert.

Design: routing is per row of the batch (a row is a group in the sense of GShard, Lepikhin et al.
2020), so an example's result does not depend on the others. Dispatch and combine are one-hot
products, which XLA turns into all-to-alls when the experts lie on different devices.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import ModelError
from shardtrain.models.decoder import DecoderConfig
from shardtrain.models.layers import Attention, RMSNorm, named


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
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ModelError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )

    def capacity(self, length: int) -> int:
        """Tokens of one row that one expert takes."""
        even = length * self.experts_per_token / self.num_experts
        return min(length, math.ceil(even * self.capacity_factor))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where tokens go. `B` rows, `T` positions, `E` experts, `C` places per expert.

    Args:
      dispatch: `[B, T, E, C]`, 1 where a token takes that place.
      combine: `[B, T, E, C]`, the weight of that expert's result for the token.
      balance: `[B]`, 1 when experts are used evenly, more otherwise (Fedus et al. 2021, eq. 4).
      dropped: `[B]`, share of choices that found no place.
    """

    dispatch: jax.Array
    combine: jax.Array
    balance: jax.Array
    dropped: jax.Array


def route(logits: jax.Array, experts_per_token: int, capacity: int) -> Routing:
    """Give every token its best experts, first choices before second ones, earlier tokens first.

    Args:
      logits: float `[B, T, E]`.
      experts_per_token: Choices per token, k.
      capacity: Places per expert and row, C.
    """
    rows, length, experts = logits.shape
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probs, experts_per_token)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    wanted = jax.nn.one_hot(chosen, experts, dtype=jnp.float32).swapaxes(1, 2)  # [B, k, T, E]
    queue = jnp.cumsum(wanted.reshape(rows, -1, experts), axis=1).reshape(wanted.shape) - 1
    kept = wanted * (queue < capacity)
    index = jnp.sum(queue * wanted, axis=-1).astype(jnp.int32)
    place = jax.nn.one_hot(index, capacity, dtype=jnp.float32)
    combine = jnp.einsum("bkte,bktc,btk->btec", kept, place, weights)
    first = wanted[:, 0]
    balance = experts * jnp.sum(jnp.mean(first, axis=1) * jnp.mean(probs, axis=1), axis=-1)
    return Routing(
        dispatch=jnp.einsum("bkte,bktc->btec", kept, place),
        combine=combine,
        balance=balance,
        dropped=1 - jnp.sum(kept, axis=(1, 2, 3)) / (length * experts_per_token),
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

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """`[B, T, embed]` -> the same shape, and where the tokens went."""
        config = self.config
        capacity = config.capacity(x.shape[1])
        routing = route(self.router(x), config.experts_per_token, capacity)
        inside = jnp.einsum("btec,btd->ebcd", routing.dispatch.astype(x.dtype), x)
        gate = jnp.einsum("ebcd,edf->ebcf", inside, self.gate[...])
        up = jnp.einsum("ebcd,edf->ebcf", inside, self.up[...])
        out = jnp.einsum("ebcf,efd->ebcd", jax.nn.silu(gate) * up, self.down[...])
        return jnp.einsum("btec,ebcd->btd", routing.combine.astype(x.dtype), out), routing


class MoEBlock(nnx.Module):
    """Attention and a mixture of experts, each behind a norm."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, rngs=rngs)
        self.attention = Attention(
            config.embed_dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            rope_theta=config.rope_theta,
            rngs=rngs,
        )
        self.moe_norm = RMSNorm(config.embed_dim, rngs=rngs)
        self.moe = MoE(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """`[B, T, embed]` -> the same shape, and where the tokens went."""
        x = x + self.attention(self.attention_norm(x))
        mixed, routing = self.moe(self.moe_norm(x))
        return x + mixed, routing


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
        self.norm = RMSNorm(width, rngs=rngs)
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
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        mean = lambda parts: sum(parts) / len(parts)
        stats = {
            "balance": mean([r.balance for r in routings]),
            "dropped": mean([r.dropped for r in routings]),
        }
        return self.unembedding(self.norm(x)), stats
