"""Gradients of bfloat16 programs come out of their sums in float32."""

from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from shardtrain.train.widen import widen

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 16, 4), jnp.bfloat16)


def equations(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for sub in jex.jaxprs_in_params(eqn.params):
            found += equations(getattr(sub, "jaxpr", sub))
    return found


def dense(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"]) * p["scale"]


def weights(*lead: int) -> Any:
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(KEY, i), (*lead, *shape))
    return {"w": draw(1, 4, 4), "b": draw(2, 4), "scale": draw(3, 4)}


def plain(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(dense(p, x).astype(jnp.float32) ** 2)


def tied(p: Any, x: jax.Array) -> jax.Array:
    tokens = jnp.arange(8) % 4
    return jnp.sum((p["w"][tokens] @ p["w"].T + p["b"]).astype(jnp.float32) ** 2)


def scanned(p: Any, x: jax.Array) -> jax.Array:
    out, _ = lax.scan(lambda h, layer: (dense(layer, h), None), x, p)
    return jnp.sum(out.astype(jnp.float32) ** 2)


def rematted(p: Any, x: jax.Array) -> jax.Array:
    block = jax.checkpoint(lambda h, layer: (dense(layer, h), None))
    return jnp.sum(lax.scan(block, x, p)[0].astype(jnp.float32) ** 2)


def shared_in_a_loop(p: Any, x: jax.Array) -> jax.Array:
    out, _ = lax.scan(lambda h, _: (dense(p, h), None), x, None, length=3)
    return jnp.sum(out.astype(jnp.float32) ** 2)


def branching(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(x[0, 0, 0] > 100, lambda: plain(p, -x), lambda: plain(p, x))


def convolution(p: Any, x: jax.Array) -> jax.Array:
    kernel = jnp.stack([p["w"], p["w"]])
    out = lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.sum((out + p["b"] * p["scale"]).astype(jnp.float32) ** 2)


CASES = {
    "plain": (plain, ()),
    "tied": (tied, ()),
    "scanned": (scanned, (3,)),
    "rematted": (rematted, (3,)),
    "shared in a loop": (shared_in_a_loop, ()),
    "branching": (branching, ()),
    "convolution": (convolution, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_no_sum_of_a_gradient_is_narrow(name: str):
    """Every contraction, scatter and reduction that makes a weight gradient gives float32."""
    loss, lead = CASES[name]
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(*lead))
    gradient = jax.grad(loss)
    before = jax.make_jaxpr(gradient)(p, X)
    after = jax.make_jaxpr(widen(gradient))(p, X)
    assert all(a.dtype == jnp.bfloat16 for a in before.out_avals)
    assert all(a.dtype == jnp.float32 for a in after.out_avals)
    shapes = {x.shape[len(lead) :] for x in jax.tree.leaves(p)}
    sums = ("add_any", "scatter-add", "dot_general", "scan")
    for eqn in equations(after.jaxpr):
        if eqn.primitive.name in sums:
            narrow = [v for v in eqn.outvars if getattr(v.aval, "dtype", None) == jnp.bfloat16]
            assert not [v for v in narrow if v.aval.shape in shapes], eqn
    exact = jax.grad(loss)(jax.tree.map(lambda x: x.astype(jnp.float32), p), X.astype(jnp.float32))
    for g, e in zip(
        jax.tree.leaves(jax.jit(widen(gradient))(p, X)), jax.tree.leaves(exact), strict=True
    ):
        np.testing.assert_allclose(g, e, rtol=0.1, atol=0.03 * float(jnp.max(jnp.abs(e))))


@pytest.mark.parametrize("name", ["tied", "rematted"])
def test_master_weights_get_what_was_summed_in_float32(name: str):
    """Float32 parameters cast inside: their gradients do not pass through bfloat16 on the way."""
    loss, lead = CASES[name]
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(*lead))
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    cast = lambda p, x: loss(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x)
    want = jax.jit(widen(jax.grad(loss)))(narrow, X)
    got = jax.jit(widen(jax.grad(cast)))(masters, X)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, want))
    assert any(bool((g != g.astype(jnp.bfloat16)).any()) for g in jax.tree.leaves(got))


@pytest.mark.parametrize("name", CASES)
def test_a_float32_program_is_left_alone(name: str):
    loss, lead = CASES[name]
    x, p = X.astype(jnp.float32), weights(*lead)
    got = jax.jit(widen(jax.grad(loss)))(p, x)
    want = jax.jit(jax.grad(loss))(p, x)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, want))


def test_sums_of_many_small_gradients_keep_what_bfloat16_would_drop():
    """1 + 4095 * 2**-9: bfloat16 stops adding at 1, float32 does not."""
    layers = jnp.ones((4096,), jnp.bfloat16)
    x = jnp.full((4096,), 2.0**-9, jnp.bfloat16).at[0].set(1.0)
    loss = lambda w: lax.scan(lambda h, v: (h + (w * v).astype(jnp.float32), None), 0.0, x)[0]
    w = layers[0]
    assert float(jax.grad(loss)(w)) < 2.1
    assert float(widen(jax.grad(loss))(w)) == 1 + 4095 * 2.0**-9


def test_a_rematerialised_block_stays_one():
    """Its backward is still marked as differentiated: XLA must not merge it with the forward."""
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(3))
    blocks = lambda fn: [
        e.params["differentiated"]
        for e in equations(jax.make_jaxpr(fn)(p, X).jaxpr)
        if "prevent_cse" in e.params
    ]
    gradient = jax.grad(rematted)
    assert blocks(widen(gradient)) == blocks(gradient) != []


def test_only_the_wanted_part_is_widened():
    both = lambda w: {"grads": w * 2, "loss": w.sum()}
    out = widen(both, lambda out: out["grads"])(jnp.ones(3, jnp.bfloat16))
    assert out["grads"].dtype == jnp.float32
    assert out["loss"].dtype == jnp.bfloat16
