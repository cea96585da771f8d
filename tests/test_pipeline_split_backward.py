"""The weight gradient leaves the backward whole, and nothing is computed twice."""

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.pipeline.split_backward import split_backward


def stage(params, smooth, fixed):
    x, mask = smooth[0], fixed[0]
    for kernel in params:
        x = x + jnp.tanh(x @ kernel) * mask
    return [x], []


def count(fn, *args):
    """Matrix products in a function."""
    eqns = jax.make_jaxpr(fn)(*args).jaxpr.eqns
    return sum(eqn.primitive.name == "dot_general" for eqn in eqns)


def test_three_parts_give_the_gradients():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, x, mask, grad = [array(8, 8) for _ in range(3)], array(4, 8), array(4, 1), array(4, 8)
    types = jax.eval_shape(lambda: (params, [x], [mask]))
    cut = split_backward(stage, *types)

    y, *kept = cut.forward(*params, x, mask)
    d_x, *residual = cut.inputs(*params, x, mask, *kept, grad)
    d_params = cut.weights(*params, *residual)

    expected, pull = jax.vjp(lambda p, x: stage(p, [x], [mask])[0][0], params, x)
    wanted_params, wanted_x = pull(grad)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(d_x, wanted_x, rtol=1e-5)
    for found, wanted in zip(d_params, wanted_params, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert count(cut.forward, *params, x, mask) == 3
    assert count(cut.inputs, *params, x, mask, *kept, grad) == 3
    assert count(cut.weights, *params, *residual) == 3
    assert [r.shape for r in cut.residual] == [r.shape for r in residual]
