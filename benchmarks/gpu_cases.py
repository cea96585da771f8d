"""What `gpu.py` measures: shapes of decoders, what each is worth in FLOPs, and what fits.

FLOPs are counted as in the literature on MFU (Chowdhery et al. 2022, appendix B), with causal
attention at half of full attention: 6 per token and parameter in a matmul (the embedding table is
looked up, not multiplied), and 6 * layers * sequence * heads * head_dim per token for scores and
values. Recomputation does not count. The peak is the chip's dense bf16 rate.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import shardtrain as st
from shardtrain.models import Decoder, DecoderConfig
from shardtrain.models.decoder import Block
from shardtrain.models.layers import Attention
from shardtrain.modules.intercept import remat_policy

_SMALL = DecoderConfig(vocab_size=32_768, head_dim=128, rope_theta=500_000.0, attention="auto")
SHAPES = {
    "0.5B": dataclasses.replace(
        _SMALL, num_layers=18, embed_dim=1536, num_heads=12, num_kv_heads=4, mlp_dim=4096
    ),
    "1B": dataclasses.replace(
        _SMALL, num_layers=22, embed_dim=2048, num_heads=16, num_kv_heads=4, mlp_dim=5632
    ),
    "3B": dataclasses.replace(
        _SMALL, num_layers=28, embed_dim=3072, num_heads=24, num_kv_heads=8, mlp_dim=8192
    ),
    "8B": dataclasses.replace(
        _SMALL, vocab_size=128_256, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8,
        mlp_dim=14_336,
    ),
    "toy": DecoderConfig(
        vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=64, attention="auto",
    ),
}  # fmt: skip
LENGTHS = (4096, 8192)
MARGIN = 0.92
"""Share of the device's memory that a plan may want: the rest is for libraries' workspaces."""


@dataclass(frozen=True)
class Case:
    """One program to be timed.

    Args:
      shape: Of `SHAPES`.
      length: Tokens per row.
      rows: Rows per step.
      remat: As in `Strategy`.
      moments: "fp32", or "bf16" for Adam's first moment in half precision.
      layers: "scanned" (the model itself loops over one block), "auto" (a list of blocks that the
        plan turns into a loop), or "unrolled" (a list that stays one).
      precision: "bf16", or "fp8" for the blocks' matmuls by qwix.
      chunks: Parts in which the logits are made; 0: all at once.
      attention: Implementation; None: the shape's own.
      xla: As in `Strategy`.
    """

    shape: str
    length: int
    rows: int = 1
    remat: str = "none"
    moments: str = "fp32"
    layers: str = "scanned"
    precision: str = "bf16"
    chunks: int = 8
    attention: str | None = None
    xla: str = "off"

    @property
    def config(self) -> DecoderConfig:
        """Sizes, with this case's attention."""
        config = SHAPES[self.shape]
        return dataclasses.replace(config, attention=self.attention or config.attention)

    @property
    def tokens(self) -> int:
        """Per step."""
        return self.rows * self.length

    @property
    def name(self) -> str:
        """For tables: `3B-4096`, and what is not the default."""
        parts = [f"{self.shape}-{self.length}"]
        parts += [] if self.layers == "scanned" else [self.layers]
        parts += [self.precision] if self.precision != "bf16" else []
        return "-".join(parts)


class ScannedDecoder(Decoder):
    """The decoder as one block in a loop: compiles in the time of one layer."""

    def __init__(self, config: DecoderConfig, *, remat: str = "none", rngs: nnx.Rngs):
        super().__init__(dataclasses.replace(config, num_layers=0), rngs=rngs)
        metadata = {nnx.PARTITION_NAME: "layers"}

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata=metadata)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.remat = remat

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """int `[B, T]` -> `[B, T, embed]`."""
        apply = with_remat(lambda block, x: block(x), self.remat, prevent_cse=False)
        metadata = {nnx.PARTITION_NAME: "layers"}
        loop = nnx.scan(
            apply, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=metadata
        )
        return self.norm(loop(self.blocks, self.embedding(tokens)))


class RecomputingDecoder(Decoder):
    """The decoder with recomputation written into it, for those who have no plan to do that."""

    def __init__(self, config: DecoderConfig, *, remat: str = "none", rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.remat = remat

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """int `[B, T]` -> `[B, T, embed]`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = with_remat(lambda block, x: block(x), self.remat)(block, x)
        return self.norm(x)


def with_remat(apply: Any, remat: str, prevent_cse: bool = True) -> Any:
    """A block's call under a policy of `Strategy(remat=...)`."""
    if remat == "none":
        return apply
    return nnx.remat(apply, policy=remat_policy(remat), prevent_cse=prevent_cse)


def make_model(case: Case, by_hand: bool = False) -> Any:
    """The function `rngs -> model` of a case; by hand, recomputation is the model's own."""

    def make(rngs: nnx.Rngs) -> Decoder:
        if case.layers == "scanned":
            return ScannedDecoder(case.config, remat=case.remat, rngs=rngs)
        if by_hand:
            return RecomputingDecoder(case.config, remat=case.remat, rngs=rngs)
        return Decoder(case.config, rngs=rngs)

    return with_fp8(case) if case.precision == "fp8" else make


def with_fp8(case: Case) -> Any:
    """The same model with FP8 matmuls in its blocks (e4m3, scaled per tensor at every step)."""
    import qwix

    # qwix runs the model once as it is made, in float32, which cuDNN's attention does not take.
    make = make_model(dataclasses.replace(case, precision="bf16", attention="xla"))

    kind = jnp.float8_e4m3fn
    rule = qwix.QtRule(
        module_path=".*blocks.*",
        weight_qtype=kind,
        act_qtype=kind,
        bwd_qtype=kind,
        disable_channelwise_axes=True,
    )
    tokens = jnp.zeros((1, 2), jnp.int32)

    def quantized(rngs: nnx.Rngs) -> Any:
        model = qwix.quantize_model(
            make(rngs), qwix.QtProvider([rule]), tokens, tokens, methods=("nats",)
        )
        for _, part in nnx.iter_graph(model):
            if isinstance(part, Attention):
                part.implementation = case.config.attention
        return model

    return quantized


def make_optimizer(case: Case) -> optax.GradientTransformation:
    """AdamW."""
    moment = jnp.bfloat16 if case.moments == "bf16" else None
    return optax.adamw(3e-4, b2=0.95, weight_decay=0.1, mu_dtype=moment)


def loss_of(case: Case) -> Any:
    """The loss with the case's way of making logits."""

    def loss(model: Any, batch: Any) -> Any:
        if case.chunks:
            return model.nats(batch["tokens"], batch["targets"], num_chunks=case.chunks)
        return st.cross_entropy(model(batch["tokens"]), batch["targets"])

    return loss


def abstract_batch(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch."""
    ids = jax.ShapeDtypeStruct((case.rows, case.length), jnp.int32)
    return {"tokens": ids, "targets": ids}


def make_plan(case: Case, **options: Any) -> st.Plan:
    """The whole AdamW step of a case through `st.plan`."""
    strategy = st.Strategy(
        data=-1,
        precision="bf16",
        remat="none" if case.layers == "scanned" else case.remat,  # there it is in the loop
        scan_layers=False if case.layers == "unrolled" else None,
        xla=case.xla,
    )
    strategy = options.pop("strategy", strategy)
    return st.plan(
        make_model(case), loss_of(case), make_optimizer(case), abstract_batch(case), strategy,
        **options,
    )  # fmt: skip


def count_parameters(config: DecoderConfig) -> tuple[int, int]:
    """(all, those in matmuls)."""
    attention = 2 * config.embed_dim * config.head_dim * (config.num_heads + config.num_kv_heads)
    block = attention + 3 * config.embed_dim * config.mlp_dim
    table = config.vocab_size * config.embed_dim
    norms = config.embed_dim * (2 * config.num_layers + 1)
    multiplied = config.num_layers * block + table
    return multiplied + table + norms, multiplied


def flops_per_token(config: DecoderConfig, length: int) -> float:
    """Forward and backward, causal attention; the convention is in the module's text."""
    _, multiplied = count_parameters(config)
    causal = 6 * config.num_layers * length * config.num_heads * config.head_dim
    return 6 * multiplied + causal


@dataclass(frozen=True)
class Choice:
    """The case that fits, and what was found on the way.

    Args:
      case: With its rows, recomputation and moments; None: nothing fits.
      planned_bytes: `plan.memory().total` of it.
      rejected: (description, bytes) of what did not fit.
    """

    case: Case | None
    planned_bytes: int
    rejected: tuple[tuple[str, int], ...] = ()


TOKENS = (32_768, 16_384, 8_192)


def choose(case: Case, limit: float, tokens: tuple[int, ...] = TOKENS) -> Choice:
    """The largest batch with the least recomputation that `plan.memory()` says fits.

    A loop over layers would keep every intermediate in float32, and write and read it; there only
    the results of matmuls and attention are kept from the start. XLA begins to recompute by itself
    well before the memory is full; where the plan says it fits, it is told not to.

    Args:
      case: Shape and length; rows, remat and moments are chosen.
      limit: Bytes of the device.
      tokens: Tokens per step to try, largest first.
    """
    rejected: list[tuple[str, int]] = []
    looped = case.layers != "unrolled"
    policies = ("dots_no_batch", "full") if looped else ("none", "dots_no_batch", "full")
    for remat in policies:
        for moments in ("fp32", "bf16"):
            for count in tokens:
                rows = max(1, count // case.length)
                found = dataclasses.replace(case, rows=rows, remat=remat, moments=moments)
                total = make_plan(found, devices=jax.devices()[:1]).memory().total
                if total <= MARGIN * limit:
                    if total > 0.7 * limit and case.xla == "off":
                        found = dataclasses.replace(found, xla="all-memory")
                    return Choice(found, total, tuple(rejected))
                rejected.append((f"{rows} rows, remat={remat}, {moments} moments", total))
    return Choice(None, 0, tuple(rejected))
