"""Small models in the style of the field, written as their authors would: no sharding anywhere.

Each entry of `ZOO` returns `(fn, params, inputs)` with abstract parameters: `fn(params, *inputs)`
is the loss.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from shardtrain.partitioning.infer.table import infer_axes

B, T, V, D, H, F = 8, 16, 96, 32, 4, 128


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def token_loss(logits, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def linen(module, loss, *inputs, call=None):
    """Abstract variables and a loss for a Linen module."""
    call = call or inputs[:1]
    variables = jax.eval_shape(module.init, jax.random.key(0), *call)
    params = variables.pop("params")

    def fn(params, *inputs):
        out = module.apply(
            {"params": params, **_zeros(variables)}, *inputs[: len(call)], mutable=["batch_stats"]
        )[0]
        return loss(out, *inputs)

    return fn, params, inputs


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def nnx_model(make, loss, *inputs):
    """Abstract parameters and a loss for an NNX module."""
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def fn(params, *inputs):
        model = nnx.merge(graph, nnx.State(params), nnx.State(_zeros_or_keys(rest)))
        return loss(model(inputs[0]), *inputs)

    return fn, params, inputs


def _zeros_or_keys(tree):
    def make(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(make, tree)


IDS = spec(B, T, dtype="int32")
IMAGES = spec(B, 16, 16, 3)
LABELS = spec(B, dtype="int32")


# ---- GPT: fused qkv, tied embeddings, learnt positions (Linen) -----------------------------------


class GptBlock(nn.Module):
    heads: int = H

    @nn.compact
    def __call__(self, x):
        b, t, d = x.shape
        qkv = nn.Dense(3 * d, name="c_attn")(nn.LayerNorm()(x))
        q, k, v = (y.reshape(b, t, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(d / self.heads)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(b, t, d)
        x = x + nn.Dense(d, name="c_proj")(y)
        h = nn.gelu(nn.Dense(4 * d, name="c_fc")(nn.LayerNorm()(x)))
        return x + nn.Dense(d, name="mlp_proj")(h)


class Gpt(nn.Module):
    vocab: int = V
    heads: int = H

    @nn.compact
    def __call__(self, ids):
        wte = nn.Embed(self.vocab, D, name="wte")
        wpe = nn.Embed(T, D, name="wpe")
        x = wte(ids) + wpe(jnp.arange(ids.shape[1])[None])
        for i in range(2):
            x = GptBlock(self.heads, name=f"h_{i}")(x)
        return wte.attend(nn.LayerNorm()(x))


def gpt(vocab=V, heads=H):
    return linen(Gpt(vocab, heads), token_loss, IDS)


# ---- Llama: GQA, RoPE, SwiGLU (NNX), unrolled or scanned -----------------------------------------


def rope(x):
    t, d = x.shape[1], x.shape[-1]
    angle = jnp.arange(t)[:, None] / 10000 ** (jnp.arange(0, d, 2) / d)
    sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class LlamaBlock(nnx.Module):
    def __init__(self, d, heads, kv_heads, hidden, rngs):
        def linear(i, o):
            return nnx.Linear(i, o, use_bias=False, rngs=rngs)

        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, d // heads
        self.norm1, self.norm2 = nnx.RMSNorm(d, rngs=rngs), nnx.RMSNorm(d, rngs=rngs)
        self.q, self.o = linear(d, d), linear(d, d)
        self.k, self.v = (linear(d, kv_heads * self.head_dim) for _ in range(2))
        self.gate, self.up, self.down = linear(d, hidden), linear(d, hidden), linear(hidden, d)

    def __call__(self, x):
        b, t, d = x.shape
        h = self.norm1(x)
        q = rope(self.q(h).reshape(b, t, self.heads, self.head_dim))
        k = rope(self.k(h).reshape(b, t, self.kv_heads, self.head_dim))
        v = self.v(h).reshape(b, t, self.kv_heads, self.head_dim)
        q = q.reshape(b, t, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / self.head_dim**0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v).reshape(b, t, d)
        x = x + self.o(y)
        h = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    def __init__(self, rngs, d=D, heads=8, kv_heads=4, hidden=F, vocab=V, layers=2, scan=False):
        def block(rngs):
            return LlamaBlock(d, heads, kv_heads, hidden, rngs)

        self.embed = nnx.Embed(vocab, d, rngs=rngs)
        self.scan = scan
        if scan:
            self.layers = nnx.split_rngs(splits=layers)(nnx.vmap(block))(rngs)
        else:
            self.layers = nnx.List([block(rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(d, rngs=rngs)
        self.lm_head = nnx.Linear(d, vocab, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        if self.scan:

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def forward(x, layer):
                return layer(x)

            x = forward(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.lm_head(self.norm(x))


def llama(ids=IDS, **sizes):
    return nnx_model(lambda: Llama(nnx.Rngs(0), **sizes), token_loss, ids)


# ---- Linen decoder scanned with remat ------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(H, use_bias=False, name="attention")(
            nn.RMSNorm()(x)
        )
        h = nn.gelu(nn.Dense(F, name="up")(nn.RMSNorm()(x)))
        return x + nn.Dense(D, name="down")(h), None


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, D, name="embed")(ids)
        blocks = nn.scan(
            nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(name="layers")(x, None)
        return nn.Dense(V, name="lm_head")(x)


def linen_scanned():
    return linen(LinenScanned(), token_loss, IDS)


# ---- ViT (Linen) ---------------------------------------------------------------------------------


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(D, (4, 4), (4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, D)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], D))
        for i in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(H, name=f"attention_{i}")(y)
            y = nn.gelu(nn.Dense(F, name=f"up_{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(D, name=f"down_{i}")(y)
        return nn.Dense(12, name="head")(nn.LayerNorm()(x)[:, 0])


def class_loss(logits, _, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def vit():
    return linen(Vit(), class_loss, IMAGES, LABELS)


# ---- encoder-decoder in the style of T5 (Linen) --------------------------------------------------


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, context, mask=None):
        return nn.MultiHeadDotProductAttention(H, use_bias=False)(x, context, mask=mask)


class T5(nn.Module):
    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(V, D, name="shared")
        x = embed(source)
        for i in range(2):
            y = nn.RMSNorm()(x)
            x = x + Attention(name=f"encoder_{i}_attention")(y, y)
            y = nn.relu(nn.Dense(F, use_bias=False, name=f"encoder_{i}_wi")(nn.RMSNorm()(x)))
            x = x + nn.Dense(D, use_bias=False, name=f"encoder_{i}_wo")(y)
        memory = nn.RMSNorm()(x)
        x = embed(target)
        mask = nn.make_causal_mask(target)
        for i in range(2):
            y = nn.RMSNorm()(x)
            x = x + Attention(name=f"decoder_{i}_attention")(y, y, mask)
            x = x + Attention(name=f"decoder_{i}_cross")(nn.RMSNorm()(x), memory)
            y = nn.relu(nn.Dense(F, use_bias=False, name=f"decoder_{i}_wi")(nn.RMSNorm()(x)))
            x = x + nn.Dense(D, use_bias=False, name=f"decoder_{i}_wo")(y)
        return nn.Dense(V, use_bias=False, name="lm_head")(nn.RMSNorm()(x))


def t5():
    source, target = IDS, spec(B, 12, dtype="int32")
    return linen(
        T5(), lambda logits, _, ids: token_loss(logits, ids), source, target, call=(source, target)
    )


# ---- MLP, mixer, convolutions, VAE ---------------------------------------------------------------


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((24, F), (F, D), (D, 12))])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def mlp():
    return nnx_model(lambda: Mlp(nnx.Rngs(0)), class_loss, spec(B, 24), LABELS)


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(D, (4, 4), (4, 4), name="patches")(images)
        x = x.reshape(x.shape[0], -1, D)
        for i in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(16, name=f"token_down_{i}")(nn.gelu(nn.Dense(64, name=f"token_up_{i}")(y)))
            x = x + y.swapaxes(1, 2)
            y = nn.gelu(nn.Dense(F, name=f"channel_up_{i}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(D, name=f"channel_down_{i}")(y)
        return nn.Dense(12, name="head")(x.mean(1))


def mixer():
    return linen(Mixer(), class_loss, IMAGES, LABELS)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(16, (3, 3))(x)))
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(16, (3, 3))(x)))
            x = x + nn.Conv(16, (3, 3), feature_group_count=4)(y)
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(12, name="head")(x.mean((1, 2)))


def conv_net():
    return linen(ConvNet(), class_loss, IMAGES, LABELS)


class Vae(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(F, name="encoder")(x))
        mean, log_var = nn.Dense(D, name="mean")(h), nn.Dense(D, name="log_var")(h)
        z = mean + jnp.exp(log_var / 2) * jax.random.normal(jax.random.key(0), mean.shape)
        y = nn.Dense(x.shape[-1], name="out")(nn.relu(nn.Dense(F, name="decoder")(z)))
        return ((y - x) ** 2).sum(-1) + (mean**2 + jnp.exp(log_var) - log_var).sum(-1)


def vae():
    return linen(Vae(), lambda loss, _: loss.mean(), spec(B, 64))


# ---- mixtures of experts -------------------------------------------------------------------------


class Moe(nnx.Module):
    def __init__(self, rngs, ragged=False):
        e, d, f = 4, D, F
        normal = jax.nn.initializers.normal()
        self.ragged = ragged
        self.embed = nnx.Embed(V, d, rngs=rngs)
        self.norm = nnx.RMSNorm(d, rngs=rngs)
        self.router = nnx.Linear(d, e, use_bias=False, rngs=rngs)
        self.w_in = nnx.Param(normal(rngs.params(), (e, d, f)))
        self.w_out = nnx.Param(normal(rngs.params(), (e, f, d)))

    def __call__(self, ids):
        x = self.embed(ids)
        h = self.norm(x)
        weight, expert = jax.lax.top_k(jax.nn.softmax(self.router(h)), 2)
        route = self._ragged if self.ragged else self._dense
        return self.embed.attend(x + route(h, weight, expert))

    def _dense(self, h, weight, expert):
        gate = (jax.nn.one_hot(expert, 4) * weight[..., None]).sum(-2)
        y = jax.nn.gelu(jnp.einsum("btd,edf->btef", h, self.w_in[...]))
        return jnp.einsum("btef,efd,bte->btd", y, self.w_out[...], gate)

    def _ragged(self, h, weight, expert):
        b, t, d = h.shape
        flat, chosen = jnp.repeat(h.reshape(-1, d), 2, axis=0), expert.reshape(-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=4)
        y = jax.nn.gelu(jax.lax.ragged_dot(flat[order], self.w_in[...], sizes))
        y = jax.lax.ragged_dot(y, self.w_out[...], sizes)
        y = y[jnp.argsort(order)].reshape(b, t, 2, d)
        return (y * weight[..., None]).sum(2)


def moe(ragged=False):
    return nnx_model(lambda: Moe(nnx.Rngs(0), ragged), token_loss, IDS)


class GShard(nn.Module):
    """Capacity, one-hot dispatch and combine."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, D, name="embed")(ids)
        gates = nn.softmax(nn.Dense(4, use_bias=False, name="router")(x))
        expert = jax.nn.one_hot(gates.argmax(-1), 4)
        place = (jnp.cumsum(expert, 1) * expert).astype(int)
        dispatch = expert[..., None] * jax.nn.one_hot(place, 8)
        w_in = self.param("w_in", nn.initializers.normal(), (4, D, F))
        w_out = self.param("w_out", nn.initializers.normal(), (4, F, D))
        h = jnp.einsum("btec,btd->becd", dispatch, x)
        h = jnp.einsum("becf,efd->becd", nn.gelu(jnp.einsum("becd,edf->becf", h, w_in)), w_out)
        y = jnp.einsum("btec,becd->btd", dispatch * gates[..., None], h)
        return nn.Dense(V, name="lm_head")(x + y)


def gshard():
    return linen(GShard(), token_loss, IDS)


# ---- fused projections of unequal width, and attention from the libraries ------------------------


class Fused(nn.Module):
    """Phi: one matrix for q, k, v with fewer key heads, one for gate and up."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, D, name="embed")(ids)
        b, t, d = x.shape
        q, k, v = jnp.split(nn.Dense(64, name="qkv")(x), [32, 48], axis=-1)
        q, k, v = (y.reshape(b, t, -1, 4) for y in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, d)
        x = x + nn.Dense(d, name="o")(y)
        gate, up = jnp.split(nn.Dense(2 * F, name="gate_up")(x), 2, axis=-1)
        x = x + nn.Dense(d, name="down")(nn.silu(gate) * up)
        return nn.Dense(V, name="lm_head")(x)


def fused():
    return linen(Fused(), token_loss, IDS)


class RepeatedKeys(nn.Module):
    """Grouped queries by repeating keys and values; learnt positions looked up."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, D, name="embed")(ids)
        x = x + nn.Embed(T, D, name="positions")(jnp.arange(ids.shape[1]))
        q = nn.DenseGeneral((8, 4), name="q")(x)
        k, v = (nn.DenseGeneral((4, 4), name=name)(x) for name in "kv")
        y = nn.dot_product_attention(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="o")(y)
        return nn.Dense(V, name="lm_head")(x)


def repeated_keys():
    return linen(RepeatedKeys(), token_loss, IDS)


# ---- recurrent -----------------------------------------------------------------------------------


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, D, name="embed")(ids)
        return nn.Dense(V, name="lm_head")(nn.RNN(nn.OptimizedLSTMCell(64), name="rnn")(x))


def lstm():
    return linen(Lstm(), token_loss, IDS)


ZOO = {
    "gpt": gpt,
    "llama": llama,
    "llama_scanned": lambda: llama(scan=True),
    "linen_scanned": linen_scanned,
    "vit": vit,
    "t5": t5,
    "mlp": mlp,
    "mixer": mixer,
    "conv_net": conv_net,
    "vae": vae,
    "moe": moe,
    "moe_ragged": lambda: moe(ragged=True),
    "gshard": gshard,
    "fused": fused,
    "repeated_keys": repeated_keys,
    "lstm": lstm,
}


@functools.cache
def zoo_table(name):
    """The axis table of a zoo model, traced once per process."""
    fn, params, inputs = ZOO[name]()
    return infer_axes(fn, params, *inputs)
