"""`st.ops`: each piece equal to a plain reference in value and gradients, and exact bytes."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import ops
from shardtrain.errors import ModelError
from shardtrain.modules import cross_entropy
from shardtrain.planner.collectives import collectives_of

B, T, N, K, H = 4, 24, 4, 2, 8


def mesh_of(devices, **sizes):
    grid = np.array(devices[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values())
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def on(mesh, fn, *specs):
    """`fn` jitted under a mesh, inputs (and gradients) laid out by specs."""

    def placed(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return jax.jit(placed, in_shardings=tuple(NamedSharding(mesh, s) for s in specs))


def assert_close(found, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance * scale, rtol=0)


def sent(compiled, mesh, kind):
    counts = Counter()
    for c in collectives_of(compiled, mesh):
        if c.kind == kind:
            counts[c.bytes] += c.count
    return dict(counts)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# -- ring attention -----------------------------------------------------------------------------


def plain_attention(q, k, v, causal):
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    if causal:
        scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def qkv():
    return normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, K, H)


def weighed(attend, causal):
    weight = normal(3, B, T, N, H)

    def loss(q, k, v):
        out = attend(q, k, v, causal=causal)
        return jnp.sum(out * weight), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.mark.parametrize(("n", "causal"), [(4, True), (4, False), (3, True), (1, True)])
def test_ring_attention_equals_attention(devices, n, causal):
    mesh = mesh_of(devices, data=2, context=n)
    spec = P("data", "context")
    found = on(mesh, weighed(ops.ring_attention, causal), spec, spec, spec)(*qkv())
    assert_close(found, weighed(plain_attention, causal)(*qkv()))


def test_ring_attention_sends_keys_and_values_and_never_all_of_them(devices):
    """n - 1 turns of keys and values, twice that with their gradients, and one turn home.

    The exchange into zigzag order and back moves each array once in two halves: query, key, value,
    output; output gradient, one number per query; three gradients. (The CPU compiler merges the
    second ring's keys and values with the first ring's.)
    """
    n = 4
    mesh = mesh_of(devices, data=2, context=n)
    spec = P("data", "context")
    compiled = on(mesh, weighed(ops.ring_attention, True), spec, spec, spec).lower(*qkv()).compile()
    part = B // 2 * T // n * H * 4
    half_query, half_key, row = part * N // 2, part * K // 2, part * N // 2 // H
    assert half_query == 2 * half_key == part * K  # the key's whole part is half the query's
    rings = (n - 1) * (2 + 2) + 2
    assert sent(compiled, mesh, "collective-permute") == {
        half_key: 2 * (2 + 2),
        half_query: 2 * (1 + 1 + 1 + 1) + rings,
        row: 2,
    }
    assert sent(compiled, mesh, "all-gather") == {}


def test_ring_attention_says_what_does_not_fit(devices):
    mesh = mesh_of(devices, context=8)
    with pytest.raises(ModelError, match=r"length 24 is not divisible by 16 \(two pieces for each"):
        on(mesh, ops.ring_attention, P(), P(), P())(*qkv())
    q, k, v = qkv()
    with pytest.raises(ModelError, match="number of heads that divides"):
        ops.ring_attention(q, k[:, :, :1].repeat(3, 2), v)


# -- cross-entropy ------------------------------------------------------------------------------

D, V = 16, 64


def logits_case():
    targets = jax.random.randint(jax.random.key(4), (8, T), 0, V)
    mask = (jax.random.uniform(jax.random.key(5), (8, T)) > 0.3).astype(jnp.float32)
    return normal(6, 8, T, D), normal(7, D, V), jnp.where(mask > 0, targets, -100), mask


def plain_loss(h, w, targets, mask):
    return cross_entropy(h @ w, jnp.where(mask > 0, targets, 0), mask).total


def chunked(h, w, targets, mask):
    return ops.chunked_cross_entropy(h, w, targets, mask, num_chunks=4).total


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 1}],
    ids=str,
)
def test_chunked_cross_entropy_equals_cross_entropy(devices, sizes):
    mesh = mesh_of(devices, **sizes)
    rows = tuple(a for a in ("data", "fsdp") if a in sizes)
    line = P(rows, "context" if "context" in sizes else None)
    matrix = P(None, "tensor" if "tensor" in sizes else None)
    gradient = lambda fn: jax.value_and_grad(fn, argnums=(0, 1))
    found = on(mesh, gradient(chunked), line, matrix, line, line)(*logits_case())
    assert_close(found, gradient(plain_loss)(*logits_case()))
    value = on(mesh, chunked, line, matrix, line, line)(*logits_case())
    assert_close(value, plain_loss(*logits_case()))


def test_a_masked_position_may_hold_anything():
    h, w, targets, mask = logits_case()
    h = jnp.where(mask[..., None] > 0, h, jnp.nan)
    grads = jax.grad(chunked, argnums=(0, 1))(h, w, targets, mask)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)


def test_chunked_cross_entropy_never_has_the_logits():
    """512 positions, 4096 words: logits of 8 MiB. With 16 chunks, half a MiB at a time."""
    h, w = jnp.zeros((1, 512, 16)), jnp.zeros((16, 4096))
    ids = jnp.zeros((1, 512), jnp.int32)
    logits = 512 * 4096 * 4

    def temp(fn):
        step = jax.jit(jax.grad(fn, argnums=(0, 1))).lower(h, w).compile()
        memory = step.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    plain = temp(lambda h, w: cross_entropy(h @ w, ids).total)
    chunks = temp(lambda h, w: ops.chunked_cross_entropy(h, w, ids, num_chunks=16).total)
    assert plain >= logits
    assert chunks < logits / 4


def test_chunked_cross_entropy_sends_row_sums_in_each_chunk_and_gradients_once(devices):
    mesh = mesh_of(devices, data=2, tensor=4)
    gradient = jax.value_and_grad(chunked, argnums=(0, 1))
    line, matrix = P("data"), P(None, "tensor")
    compiled = on(mesh, gradient, line, matrix, line, line).lower(*logits_case()).compile()
    rows, chunks = 4 * T // 4 * 4, 4
    found = sorted((c.axes, c.bytes, c.count) for c in collectives_of(compiled, mesh))
    assert found == sorted(
        [
            (("data",), D * V // 4 * 4 + 4, 1),  # with the loss
            (("tensor",), rows, chunks),  # the largest logit
            (("tensor",), 2 * rows, chunks),  # the sum of exponentials, the target's logit
            (("tensor",), 4 * T * D * 4, 1),
        ]
    )


# -- experts ------------------------------------------------------------------------------------

E, C = 8, 6


def routed():
    x, scores = normal(8, 8, T, D), normal(9, 8, T, E)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores), 2)
    return x, chosen, weights, normal(10, E, D, D)


def dispatched(capacity):
    def loss(x, weights, kernel, chosen):
        apply = lambda v: jnp.tanh(jnp.einsum("end,edf->enf", v, kernel))
        y, dropped = ops.dispatch_experts(x, chosen, weights, apply, E, capacity)
        return jnp.sum(y**2), (y, dropped)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def every_expert(x, weights, kernel, chosen):
    """Dense: every expert computes every token."""
    made = jnp.tanh(jnp.einsum("btd,edf->btef", x, kernel))
    gates = jnp.sum(jax.nn.one_hot(chosen, E) * weights[..., None], axis=2)
    y = jnp.einsum("btef,bte->btf", made, gates)
    return jnp.sum(y**2), (y, jnp.zeros(len(x)))


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"data": 1}], ids=str)
def test_without_a_limit_experts_equal_dense_ones(devices, sizes):
    x, chosen, weights, kernel = routed()
    mesh = mesh_of(devices, **sizes)
    rows = P(tuple(sizes))
    where = P("expert" if "expert" in sizes else None)
    found = on(mesh, dispatched(T), rows, rows, where, rows)(x, weights, kernel, chosen)
    wanted = jax.grad(every_expert, argnums=(0, 1, 2), has_aux=True)(x, weights, kernel, chosen)
    assert_close(found[0], wanted[0])
    assert_close(found[1][0], wanted[1][0])
    assert found[1][1].tolist() == [0.0] * 8


def test_top_experts_is_top_k():
    scores = normal(12, 3, 5, 6).at[0, 0].set(1.0)  # a tie goes to the first
    found = ops.top_experts(scores, 3)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(jax.lax.top_k(scores, 3)))


def test_what_finds_no_place_adds_nothing():
    x = normal(11, 1, 4, 2)
    chosen = jnp.array([[[0], [0], [1], [0]]])
    y, dropped = ops.dispatch_experts(x, chosen, jnp.ones((1, 4, 1)), lambda v: v, 2, 2)
    np.testing.assert_array_equal(y[0, :3], x[0, :3])
    np.testing.assert_array_equal(y[0, 3], jnp.zeros(2))
    assert dropped.tolist() == [0.25]
    assert ops.capacity_of(24, 2, 8, 1.0) == 6
    assert ops.capacity_of(24, 2, 8, 100.0) == 24


def test_experts_send_their_places_there_and_back(devices):
    """Two all-to-alls forward, two backward, each of this device's places."""
    x, chosen, weights, kernel = routed()
    mesh = mesh_of(devices, data=2, expert=4)
    rows = P(("data", "expert"))
    step = on(mesh, dispatched(C), rows, rows, P("expert"), rows)
    compiled = step.lower(x, weights, kernel, chosen).compile()
    places = 8 // 8 * E * C * D * 4
    assert sent(compiled, mesh, "all-to-all") == {places: 4}
    kinds = {c.kind for c in collectives_of(compiled, mesh)}
    assert kinds <= {"all-to-all", "all-reduce"}


def test_experts_that_do_not_divide_are_refused(devices):
    x, chosen, weights, _ = routed()
    mesh = mesh_of(devices, expert=3)
    run = on(mesh, lambda x: ops.dispatch_experts(x, chosen, weights, lambda v: v, E, C), P())
    with pytest.raises(ModelError, match="expert=3 does not divide 8 experts"):
        run(x)


# -- choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "dtype", "dim", "context", "chosen", "reason"),
    [
        ("gpu", "bfloat16", 64, 1, "cudnn", "bfloat16, head dim 64"),
        ("gpu", "float32", 64, 1, "xla", "not float32"),
        ("gpu", "bfloat16", 100, 1, "xla", "head dim 100"),
        ("cpu", "bfloat16", 64, 1, "xla", "this is cpu"),
        ("gpu", "bfloat16", 64, 4, "ring", "context=4"),
    ],
)
def test_the_choice_says_why(platform, dtype, dim, context, chosen, reason):
    q = jax.ShapeDtypeStruct((2, 128, 8, dim), jnp.dtype(dtype))
    found = ops.choose_attention(q, q, platform=platform, context=context)
    assert found.implementation == chosen
    assert reason in found.reason


def test_attention_runs_what_it_chose(devices):
    assert_close(ops.attention(*qkv()), plain_attention(*qkv(), True))
    mesh = mesh_of(devices, context=4)
    spec = P(None, "context")
    assert_close(on(mesh, ops.attention, spec, spec, spec)(*qkv()), plain_attention(*qkv(), True))
    with pytest.raises(ModelError, match="did you mean 'cudnn'"):
        ops.attention(*qkv(), implementation="cudn")
