"""Traced functions with edited equations: the same numbers, also inside loops and branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardtrain.partitioning.edit import Edit, rewrite

DOUBLE = Edit(results={0: lambda x: 2 * x})


def on_sine(edit):
    return lambda program: lambda eqn: edit if eqn.primitive.name == "sin" else None


def looped(x):
    return jax.lax.scan(lambda c, w: (c + w * jnp.sin(x), c), x, jnp.arange(3.0))


def branched(x):
    return jax.lax.cond(x > 0, lambda v: jnp.sin(v) * v, lambda v: v, x)


def rematerialised(x):
    return jax.checkpoint(lambda v: jnp.exp(jax.jit(jnp.sin)(v)))(x)


def custom(x):
    return jax.nn.silu(jnp.sin(x)) + jax.nn.relu(x)  # their own derivatives are kept


def double_sine(monkeypatch, fn, x):
    """The same function where sine itself is doubled."""
    sine = jnp.sin
    with monkeypatch.context() as patched:
        patched.setattr(jnp, "sin", lambda v: 2 * sine(v))
        return jax.value_and_grad(lambda v: jnp.sum(jax.tree.leaves(fn(v))[0]))(x)


@pytest.mark.parametrize("fn", [looped, branched, rematerialised, custom])
def test_edits_reach_into(monkeypatch, fn):
    edited = rewrite(fn, on_sine(DOUBLE))
    total = lambda v: jnp.sum(jax.tree.leaves(edited(v))[0])
    found = jax.value_and_grad(total)(0.7)
    if fn is rematerialised:  # jit has traced its sine already
        e = np.exp(2 * np.sin(0.7))
        np.testing.assert_allclose(found, (e, e * 2 * np.cos(0.7)), rtol=1e-6)
    else:
        np.testing.assert_allclose(found, double_sine(monkeypatch, fn, 0.7), rtol=1e-6)
    mapped = jax.vmap(rewrite(fn, on_sine(DOUBLE)))(jnp.array([0.7, 0.2]))
    np.testing.assert_allclose(
        jax.tree.leaves(mapped)[0][0], jax.tree.leaves(edited(0.7))[0], rtol=1e-6
    )


def test_without_edits_nothing_changes():
    same = rewrite(looped, lambda program: lambda eqn: None)
    jax.tree.map(np.testing.assert_array_equal, same(0.7), looped(0.7))


def test_one_change_of_one_variable_is_made_once():
    """Readers of one array share what is done to it, so that their gradients are added first."""
    calls = []

    def count(x):
        calls.append(1)
        return x

    change = Edit(operands={0: count})
    find = lambda program: lambda eqn: change if eqn.primitive.name == "dot_general" else None
    w = jnp.ones((2, 2))
    np.testing.assert_array_equal(rewrite(lambda x: x @ w + x @ (2 * w), find)(w), 6 * w)
    assert calls == [1]
