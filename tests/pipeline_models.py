"""Tiny models, written as anybody would, for the pipeline tests."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shardtrain.modules import Mean, cross_entropy, model_form, standardize
from shardtrain.modules.intercept import Calls

WIDTH, VOCAB, LENGTH = 8, 16, 6


def abstract_batch(rows):
    shape = (rows, LENGTH)
    return {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
        "mask": jax.ShapeDtypeStruct(shape, jnp.float32),
    }


BATCH = abstract_batch(4)


def make_batch(rows):
    """Tokens with ragged masks: microbatches weigh differently."""
    rng = np.random.default_rng(0)
    shape = (rows, LENGTH)
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
        "mask": jnp.asarray(rng.random(shape) > 0.3, jnp.float32),
    }


class LinenBlock(nn.Module):
    rate: float = 0.1
    wide: int = 2

    @nn.compact
    def __call__(self, x, mask):
        h = nn.Dense(self.wide * WIDTH)(nn.LayerNorm()(x))
        h = nn.Dense(WIDTH)(nn.relu(h)) * mask[:, :, None]
        return x + nn.Dropout(self.rate, deterministic=False)(h)


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return LinenBlock()(x, mask), None


class LinenModel(nn.Module):
    """Tied embedding, padding mask shared by all blocks, dropout."""

    mode: str = "loop"
    layers: int = 4

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH)
        x, mask = embed(tokens), (tokens > 0).astype(jnp.float32)
        if self.mode.startswith("scan"):
            block = nn.remat(ScannedBlock) if "remat" in self.mode else ScannedBlock
            x, _ = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.layers,
            )(name="layers")(x, mask)
            return embed.attend(x)
        block = nn.remat(LinenBlock) if self.mode == "remat" else LinenBlock
        for n in range(self.layers):
            rate = 0.1 * (n + 1) if self.mode == "rates" else 0.1
            wide = 1 + n % 2 if self.mode == "alternating" else 2
            x = block(name=f"layer_{n}", rate=rate, wide=wide)(x, mask)
        return embed.attend(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs, norm=False, rate=0.1):
        # A bias before a BatchNorm has no gradient: only rounding noise to compare.
        self.linear = nnx.Linear(WIDTH, WIDTH, use_bias=not norm, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate and not norm else None

    def __call__(self, x, mask):
        h = self.linear(x)
        h = h if self.norm is None else self.norm(h)
        h = h if self.dropout is None else self.dropout(h)
        return x + jax.nn.gelu(h) * mask[:, :, None]


class AuxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        h = self.linear(x) * mask[:, :, None]
        return x + jnp.tanh(h), jnp.mean(h**2)


class NnxModel(nnx.Module):
    def __init__(self, rngs, mode="plain", layers=4):
        self.mode = mode
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(LENGTH))
        if mode == "scan":
            make = nnx.split_rngs(splits=layers)(
                nnx.vmap(lambda rngs: NnxBlock(rngs), in_axes=(0,), out_axes=0)
            )
            self.blocks = make(rngs)
        elif mode.startswith("aux"):
            self.blocks = nnx.List([AuxBlock(rngs) for _ in range(layers)])
        else:
            rate = 0.0 if mode == "dry" else 0.1
            self.blocks = nnx.List([NnxBlock(rngs, mode == "norm", rate) for _ in range(layers)])

    def __call__(self, tokens):
        x, mask = self.embed(tokens), (tokens > 0).astype(jnp.float32)
        if self.mode == "plain":
            x = self.dropout(x)
        mask = mask * self.scale[...]  # every block reads a parameter that is not its own
        if self.mode == "scan":
            run = nnx.scan(
                lambda block, x, mask: block(x, mask),
                in_axes=(0, nnx.Carry, None),
                out_axes=nnx.Carry,
            )
            return self.head(run(self.blocks, x, mask))
        if self.mode.startswith("aux"):
            return self._with_aux(x, mask)
        for block in self.blocks:
            if self.mode == "remat":
                x = nnx.remat(lambda block, x, mask: block(x, mask))(block, x, mask)
            else:
                x = block(x, mask)
        return self.head(x)

    def _with_aux(self, x, mask):
        total, each = 0.0, []
        for block in self.blocks:
            x, aux = block(x, mask)
            each.append(aux)
            total = total + aux
        return self.head(x), sum(each) if self.mode == "aux list" else total


def loss(model, batch):
    logits = model(batch["tokens"])
    logits, aux = logits if isinstance(logits, tuple) else (logits, 0.0)
    found = cross_entropy(logits, batch["targets"], batch["mask"])
    right = jnp.sum((logits.argmax(-1) == batch["targets"]) * batch["mask"])
    accuracy = Mean(right, found.weight)
    return Mean(found.total + aux * found.weight, found.weight), {"accuracy": accuracy}


def setup(model, rows=4):
    """The functional form, `make_loss`, and fresh values of a model."""
    example = lambda model, batch: loss(model, batch)
    form = model_form(model, example, abstract_batch(rows))

    def make_loss(user_loss):
        def pure(params, variables, batch, key):
            out, new = form.apply(user_loss, params, variables, key, True, (batch,), Calls())
            return standardize(out, 2, False)[0], new

        return pure

    return form, make_loss, *jax.jit(form.init)(jax.random.key(0))
