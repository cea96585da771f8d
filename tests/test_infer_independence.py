"""`batch_independence` against the numbers: split the batch for real and add the parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from shardtrain.partitioning.infer.independence import batch_independence

B, T, D, V = 8, 6, 4, 12
W = jax.random.normal(jax.random.key(1), (D, V))
X = jax.random.normal(jax.random.key(2), (B, T, D))
IDS = jax.random.randint(jax.random.key(3), (B, T), 0, V)
LABELS = IDS[:, 0]
IMAGES = jax.random.normal(jax.random.key(4), (B, 8, 8, 4))
MASK = jnp.arange(T) < jnp.arange(1, B + 1)[:, None] % T


def adds_up(fn, params, batch, *rest, parts):
    """Whether evaluating each part and adding gives the whole, in float64-like tolerance."""
    fn = jax.jit(fn)
    whole = jax.tree.leaves(fn(params, batch, *rest))
    size = B // parts
    total = [np.zeros_like(x) for x in whole]
    for r in range(parts):
        part = jax.tree.map(lambda x: x[r * size : (r + 1) * size], batch)
        values = jax.tree.leaves(fn(params, part, *rest))
        if any(np.shape(v) != np.shape(t) for v, t in zip(values, total, strict=True)):
            return False
        total = [t + v for t, v in zip(total, values, strict=True)]
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(whole, total, strict=True))


def gradient_adds_up(fn, params, batch, parts):
    def loss(p, b):
        return jax.tree.leaves(fn(p, b))[0]

    return adds_up(jax.grad(loss), params, batch, parts=parts)


# ---- functions that are sums over examples -------------------------------------------------------


def token_loss(w, batch):
    x, ids, mask = batch
    logp = jax.nn.log_softmax(x @ w)
    loss = -jnp.take_along_axis(logp, ids[..., None], -1)[..., 0]
    return (loss * mask).sum(), mask.sum(), (jnp.argmax(logp, -1) == ids).sum()


def flattened_tokens(w, batch):
    x, ids, _ = batch
    logits = (x.reshape(-1, D) @ w).reshape(-1, T, V)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids).sum(), ids.size


def one_hot_loss(w, batch):
    x, ids, mask = batch
    return optax.softmax_cross_entropy(x @ w, jax.nn.one_hot(ids, V)).sum(where=mask)


def arange_indexing(w, batch):
    x, ids, _ = batch
    logp = jax.nn.log_softmax(x.mean(1) @ w)
    return -logp[jnp.arange(ids.shape[0]), ids[:, 0]].sum()


def embedding(w, batch):
    _, ids, mask = batch
    h = w.T[ids]
    scores = jnp.einsum("btd,bsd->bts", h, h)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e9)
    return (jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), h) ** 2).sum(where=mask[..., None])


def time_scan(w, batch):
    def cell(h, x):
        h = jnp.tanh(0.1 * h @ w @ w.T + x)  # a recurrence that forgets
        return h, h

    x = batch[0]
    _, hs = jax.lax.scan(cell, jnp.zeros((x.shape[0], D)), x.swapaxes(0, 1))
    return (hs**2).sum()


def layer_scan_remat(w, batch):
    @jax.checkpoint
    def layer(h, v):
        return jax.nn.gelu(h + h @ v @ v.T), None

    h, _ = jax.lax.scan(layer, batch[0], jnp.stack([w, 2 * w]))
    return jnp.sum(h)


def fixed_while(w, batch):
    return jax.lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ w @ w.T) * i, batch[0]).sum()


def chunked_sum(w, batch):
    """A sum accumulated over chunks of time."""
    chunks = batch[0].reshape(-1, 2, T // 2, D).swapaxes(0, 1)
    return jax.lax.scan(lambda c, x: (c + ((x @ w) ** 2).sum(), None), 0.0, chunks)[0]


def static_cond(w, batch):
    return jax.lax.cond(w[0, 0] > 0, lambda x: jnp.sin(x).sum(), lambda x: x.sum(), batch[0] @ w)


def conv_net(w, x):
    k = jnp.tile(w[None, None], (3, 3, 1, 1))
    h = jax.nn.relu(
        jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    return nn.avg_pool(nn.max_pool(h, (2, 2), (2, 2)), (4, 4)).sum()


def sort_in_example(w, batch):
    values, _ = jax.lax.top_k(batch[0] @ w, 2)
    return (jnp.sort(values, axis=1) * jnp.arange(T)[:, None]).sum() + jnp.cumsum(values, 1).max(
        1
    ).sum()


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def adversarial(w, batch):
    return (reversed_gradient(batch[0] @ w) ** 2).sum()


def weights_of_weights(w, batch):
    """Look-ups, sums and products of weights alone, linear algebra, a zero that is not."""
    table = (w @ w.T)[jnp.arange(D)[::-1]] + jnp.linalg.inv(w @ w.T + 9 * jnp.eye(D))
    return (batch[0] @ jnp.exp(jnp.zeros((D, D)) * w.sum()) @ table).sum() + jnp.zeros(())


def vmapped(w, batch):
    def one(x, ids):
        return jnp.sum(jnp.take_along_axis(jax.nn.softmax(x @ w), ids[:, None], 1))

    return jax.vmap(one)(batch[0], batch[1]).sum()


BATCH = (X, IDS, MASK)
SUMS = [
    (token_loss, W, BATCH),
    (flattened_tokens, W, BATCH),
    (one_hot_loss, W, BATCH),
    (arange_indexing, W, BATCH),
    (embedding, W, BATCH),
    (time_scan, W, BATCH),
    (layer_scan_remat, W, BATCH),
    (fixed_while, W, BATCH),
    (chunked_sum, W, BATCH),
    (static_cond, W, BATCH),
    (conv_net, W, IMAGES),
    (sort_in_example, W, BATCH),
    (adversarial, W, BATCH),
    (vmapped, W, BATCH),
    (weights_of_weights, W, BATCH),
]


@pytest.mark.parametrize("case", SUMS, ids=lambda c: c[0].__name__)
def test_sums_over_examples_are_proven_and_add_up(case):
    fn, params, batch = case
    answer = batch_independence(fn, params, batch, parts=4)
    assert answer.ok, answer
    assert batch_independence(fn, params, batch).ok

    def everything(params, batch):
        value, vjp = jax.vjp(lambda p: jax.tree.leaves(fn(p, batch))[0], params)
        return vjp(jnp.ones_like(value)), fn(params, batch)

    assert adds_up(everything, params, batch, parts=4)


# ---- functions that couple examples --------------------------------------------------------------


def mean(w, batch):
    return (batch[0] @ w).mean()


def weighted_mean(w, batch):
    x, _, mask = batch
    return (x @ w).sum(-1).sum(where=mask) / mask.sum()


def batch_norm(w, batch):
    h = (batch[0] @ w).sum(1)
    h = h - h.sum(0) / 8.0
    return (h**2).sum()


def contrastive(w, batch):
    z = (batch[0] @ w).sum(1)
    return jax.nn.logsumexp(z @ z.T, axis=1).sum()


def dropout(w, batch):
    h = batch[0] @ w
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0).sum()


def position_weights(w, batch):
    h = (batch[0] @ w).sum((1, 2))
    return (h * jnp.arange(h.shape[0])).sum()


def numpy_weights(w, batch):
    h = (batch[0] @ w).sum((1, 2))
    return (h * np.linspace(0, 1, h.shape[0])).sum()


def softmax_over_batch(w, batch):
    return jax.nn.softmax((batch[0] @ w).sum((1, 2))) @ (batch[0] ** 2).sum((1, 2))


def weight_decay(w, batch):
    return (batch[0] @ w).sum() + (w**2).sum()


def first_example(w, batch):
    return (batch[0][0] @ w).sum()


def max_over_batch(w, batch):
    return (batch[0] @ w).max()


def squared_sum(w, batch):
    return (batch[0] @ w).sum() ** 2


def cumsum_over_batch(w, batch):
    return jnp.cumsum((batch[0] @ w).sum((1, 2))).sum()


def two_views(w, batch):
    """Rows of two concatenated views, indexed as one batch."""
    z = jnp.concatenate([batch[0], batch[0] ** 2]).sum(1) @ w
    return (z[: z.shape[0] // 2] * z[::-1][: z.shape[0] // 2]).sum()


def python_branch(w, batch):
    h = (batch[0] @ w).sum()
    return h if batch[0].shape[0] == 8 else 2 * h


def time_major_reshape(w, batch):
    h = (batch[0].swapaxes(0, 1).reshape(-1, D) @ w).reshape(-1, T, V)
    return (h.sum(1) ** 2).sum()


def keeps_the_batch(w, batch):
    return (batch[0] @ w).sum((1, 2))


def constant_output(w, batch):
    return (batch[0] @ w).sum(), (w**2).sum()


def expert_capacity(w, batch):
    """Tokens beyond an expert's capacity, counted over the whole batch, are dropped."""
    x = batch[0].reshape(-1, D)
    expert = jax.nn.one_hot(jnp.argmax(x @ w, -1), V)
    place = jnp.cumsum(expert, 0) * expert
    return (x.sum(-1, keepdims=True) * expert * (place <= 2)).sum()


def batch_while(w, batch):
    def more(state):
        return (state[1] ** 2).sum() > 1.0

    return jax.lax.while_loop(more, lambda s: (s[0] + 1.0, s[1] * 0.5), (0.0, batch[0]))[0]


def loop_over_batch(w, batch):
    """Each step sees the examples before it."""
    h0 = jnp.zeros(D)
    return jax.lax.scan(lambda c, x: (jnp.tanh(c + x[0]), c.sum()), h0, batch[0])[1].sum()


COUPLED = [
    (mean, "a mean over the batch: divides by 576.0 at batch size 8"),
    (weighted_mean, "divides by a batch sum"),
    (batch_norm, "combines a sum over the batch with per-example values"),
    (contrastive, "batch x batch"),
    (dropout, "random numbers"),
    (position_weights, "position of each example"),
    (numpy_weights, "constant array shaped by the batch"),
    (softmax_over_batch, "`reduce_max` over the batch"),
    (weight_decay, "counted once per part"),
    (first_example, "takes some of the examples"),
    (max_over_batch, "`reduce_max` over the batch"),
    (squared_sum, "of a sum over the batch is not linear"),
    (cumsum_over_batch, "`cumsum` along the batch dim"),
    (two_views, "concatenates along the batch"),
    (python_branch, "changes with the batch size"),
    (time_major_reshape, "mixes the batch with another dim"),
    (keeps_the_batch, "keeps the batch"),
    (constant_output, "output 1: does not depend on the batch"),
    (expert_capacity, "`cumsum` along the batch dim"),
    (batch_while, "condition depends on the batch"),
    (loop_over_batch, "a loop over the batch"),
]


@pytest.mark.parametrize(("fn", "words"), COUPLED, ids=lambda c: getattr(c, "__name__", ""))
def test_coupled_examples_are_refused_and_do_not_add_up(fn, words):
    answer = batch_independence(fn, W, BATCH, parts=2)
    assert not answer.ok
    assert words in answer.reason
    assert not adds_up(fn, W, BATCH, parts=2)


def test_the_line_at_fault_is_named():
    assert "test_infer_independence.py:" in batch_independence(mean, W, BATCH).source
    assert "(contrastive)" in batch_independence(contrastive, W, BATCH).source
    assert "(dropout)" in batch_independence(dropout, W, BATCH).source


def test_dropout_can_be_treated_as_per_example_noise():
    assert batch_independence(dropout, W, BATCH, ignore_random=True).ok
    assert not batch_independence(contrastive, W, BATCH, ignore_random=True).ok


def test_a_custom_gradient_that_couples_examples_is_found():
    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda _, g: (g / (1 + jnp.linalg.norm(g)),))

    def fn(w, batch):
        return (clip(batch[0] @ w) ** 2).sum()

    assert adds_up(fn, W, BATCH, parts=2)
    assert not gradient_adds_up(fn, W, BATCH, parts=2)
    answer = batch_independence(fn, W, BATCH)
    assert not answer.ok
    assert "custom derivative" in answer.reason


def test_unknown_primitives_are_refused():
    def fn(w, batch):
        out = jax.ShapeDtypeStruct(batch[0].shape, "float32")
        return jax.pure_callback(lambda x: np.asarray(x), out, batch[0]).sum()

    answer = batch_independence(fn, W, BATCH)
    assert not answer.ok
    assert "pure_callback" in answer.reason


def test_leaves_without_a_common_batch_dim_are_refused():
    assert not batch_independence(lambda w, b: b[0].sum(), W, (X, W)).ok


def test_a_model_that_hard_codes_its_batch_is_refused():
    answer = batch_independence(
        lambda w, b: (b[0].reshape(8, T * D) @ jnp.ones(T * D)).sum(), W, BATCH
    )
    assert not answer.ok
    assert "cannot be traced at batch size 16" in answer.reason


# ---- whole models --------------------------------------------------------------------------------


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, 8)(ids)
        mask = nn.make_causal_mask(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x))))
        return nn.Dense(V)(x)


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(V)(nn.RNN(nn.OptimizedLSTMCell(8))(nn.Embed(V, 8)(ids)))


class LinenBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(V)(nn.BatchNorm(use_running_average=False)(nn.Embed(V, 8)(ids)))


def sum_of_tokens(logits, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids).sum(), ids.size


@pytest.mark.parametrize(
    ("module", "expected"),
    [(LinenTransformer, True), (LinenRecurrent, True), (LinenBatchNorm, False)],
)
def test_linen_models(module, expected):
    model = module()
    variables = model.init(jax.random.key(0), IDS)

    def fn(variables, ids):
        logits, _ = model.apply(variables, ids, mutable=["batch_stats"])
        return sum_of_tokens(logits, ids)

    assert batch_independence(fn, variables, IDS).ok is expected
    assert adds_up(fn, variables, IDS, parts=2) is expected


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.silu(self.up(x)))


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, 8, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def blocks(rngs):
            return NnxBlock(rngs)

        self.blocks = blocks(rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, block):
            return block(x)

        return self.embed.attend(forward(self.embed(ids), self.blocks))


class NnxExperts(nnx.Module):
    """Dense dispatch without capacity: every token sees every expert, weighted."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, 8, rngs=rngs)
        self.router = nnx.Linear(8, 3, rngs=rngs)
        self.up = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 16)))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (3, 16, 8)))

    def __call__(self, ids):
        x = self.embed(ids)
        weight, expert = jax.lax.top_k(jax.nn.softmax(self.router(x)), 2)
        gate = (jax.nn.one_hot(expert, 3) * weight[..., None]).sum(-2)
        h = jax.nn.relu(jnp.einsum("btd,edf->btef", x, self.up[...]))
        return self.embed.attend(jnp.einsum("btef,efd,bte->btd", h, self.down[...], gate))


@pytest.mark.parametrize("module", [NnxScanned, NnxExperts])
def test_nnx_models(module):
    graph, state = nnx.split(module(nnx.Rngs(0)))

    def fn(state, ids):
        return sum_of_tokens(nnx.merge(graph, state)(ids), ids)

    answer = batch_independence(fn, state, IDS, parts=4)
    assert answer.ok, answer
    assert adds_up(fn, state, IDS, parts=4)
