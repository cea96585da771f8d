"""Soundness of `batch_independence`: random programs it accepts really do add up.

Programs are sequences of array operations along random axes, many of which mix examples. The
analysis may refuse too much; what it accepts is evaluated whole and in parts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardtrain.partitioning.infer.independence import batch_independence

B = 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, 2, 3)))
Y = jnp.asarray(np.random.default_rng(1).integers(0, 2, size=(B, 2, 3)))
W = jnp.asarray(np.random.default_rng(2).normal(size=(3,)))


def axis_of(x, axis):
    return axis % max(x.ndim, 1)


def along(fn):
    """An operation along one axis; scalars pass."""
    return lambda x, y, axis: fn(x, y, axis_of(x, axis)) if x.ndim else x


OPERATIONS = {
    "tanh": lambda x, y, a: jnp.tanh(x),
    "square": lambda x, y, a: x * x,
    "double": lambda x, y, a: 2.0 * x,
    "negate": lambda x, y, a: -x,
    "add one": lambda x, y, a: x + 1.0,
    "residual": lambda x, y, a: x + jnp.sin(x),
    "where": lambda x, y, a: jnp.where(x > 0, x, 0.5 * x),
    "sum": along(lambda x, y, a: x.sum(a)),
    "keep sum": along(lambda x, y, a: x - x.sum(a, keepdims=True)),
    "mean": along(lambda x, y, a: x.mean(a)),
    "max": along(lambda x, y, a: x.max(a)),
    "softmax": along(lambda x, y, a: jax.nn.softmax(x, a)),
    "cumsum": along(lambda x, y, a: jnp.cumsum(x, a)),
    "sort": along(lambda x, y, a: jnp.sort(x, a)),
    "flip": along(lambda x, y, a: jnp.flip(x, a)),
    "roll": along(lambda x, y, a: jnp.roll(x, 1, a)),
    "first": along(lambda x, y, a: jnp.take(x, 0, axis=a)),
    "half": along(lambda x, y, a: jax.lax.slice_in_dim(x, 0, x.shape[a] // 2 or 1, axis=a)),
    "twice": along(lambda x, y, a: jnp.concatenate([x, x], a)),
    "stack": along(lambda x, y, a: jnp.stack([x, 2 * x], a)),
    "weight": along(
        lambda x, y, a: x * jnp.arange(x.shape[a]).reshape(-1, *[1] * (x.ndim - a - 1))
    ),
    "swap": along(lambda x, y, a: jnp.swapaxes(x, 0, a)),
    "flatten": lambda x, y, a: x.reshape(-1),
    "merge": along(lambda x, y, a: x.reshape(*x.shape[:a], -1, *x.shape[a + 2 :])),
    "split": along(lambda x, y, a: x.reshape(*x.shape[:a], -1, 1, *x.shape[a + 1 :])),
    "rows": lambda x, y, a: x.reshape(y.shape[0], -1) if x.size % y.shape[0] == 0 else x,
    "gram": along(lambda x, y, a: jnp.tensordot(x, x, (a, a)) if x.ndim < 3 else x),
    "pairs": lambda x, y, a: x @ x.T if x.ndim == 2 else x,
    "rescale": lambda x, y, a: x / y.shape[0],
    "count": lambda x, y, a: x * y.shape[0],
    "inputs": lambda x, y, a: x * y if x.shape == y.shape else x,
    "pick": along(
        lambda x, y, a: jnp.take_along_axis(x, y, a) if x.shape == y.shape and x.shape[a] > 1 else x
    ),
    "rows of table": lambda x, y, a: W[y] * x if x.shape == y.shape else x,
    "norm": lambda x, y, a: x / (1.0 + jnp.linalg.norm(x)),
    "scan": along(lambda x, y, a: jax.lax.scan(lambda c, v: (c + v, c), x[0] * 0, x)[a % 2]),
    "remat": lambda x, y, a: jax.checkpoint(jnp.sin)(x),
    "vmap": along(lambda x, y, a: jax.vmap(lambda v: v / (1 + (v * v).sum()))(x)),
    "cond": lambda x, y, a: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "cond on weights": lambda x, y, a: jax.lax.cond(W[0] > 0, jnp.sin, jnp.cos, x),
    "one hot": along(
        lambda x, y, a: (jax.nn.one_hot(y, 3) * x[..., None]).sum(a) if x.shape == y.shape else x
    ),
}


def program(steps, last):
    def fn(w, batch):
        x, y = batch
        x = x * w
        for name, axis in steps:
            x = OPERATIONS[name](x, y, axis)
        return {"sum": x.sum(), "steps": x if last else x.sum(), "count": y.size}

    return fn


def adds_up(fn, parts):
    whole = jax.tree.leaves(fn(W, (X, Y)))
    size = B // parts
    pieces = [
        jax.tree.leaves(fn(W, (X[r * size : (r + 1) * size], Y[r * size : (r + 1) * size])))
        for r in range(parts)
    ]
    return all(
        np.shape(p) == np.shape(w) for piece in pieces for p, w in zip(piece, whole, strict=True)
    ) and all(
        np.allclose(w, sum(p), rtol=1e-4, atol=1e-4, equal_nan=True)
        for w, *p in zip(whole, *pieces, strict=True)
    )


accepted = []


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 2)), max_size=5),
    st.booleans(),
)
def check_random_program(steps, last):
    fn = program(steps, last)
    if batch_independence(fn, W, (X, Y), parts=2).ok:
        accepted.append(steps)
        assert adds_up(fn, 2), steps


def test_what_is_accepted_adds_up():
    accepted.clear()
    check_random_program()
    assert len(accepted) > 60
    assert len({name for steps in accepted for name, _ in steps}) > 20
