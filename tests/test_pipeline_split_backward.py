"""The weight gradient leaves the backward whole, and no product is computed twice."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from shardtrain.pipeline.jaxprs import flatten
from shardtrain.pipeline.least_storage import least_storage
from shardtrain.pipeline.residual import Residual
from shardtrain.pipeline.split_backward import split_backward

LAYERS, WIDTH, ROWS = 3, 8, 4


def layer(params, shared, layered, carry):
    """Reads a mask and a gain that all layers share, a scale of its own, and counts layers."""
    (kernel,), (mask, gain), (index, scale), (x, count) = params, shared, layered, carry
    hidden = jax.nn.gelu(x @ kernel) * scale
    return [x + hidden * mask * gain, count + index]


def by_loop(params, shared, scale, x):
    count = 0
    for n in range(LAYERS):
        (x, count) = layer([params[0][n]], shared, [n, scale[n]], [x, count])
    return x


def products(jaxpr):
    """Matrix products in a function, those of a loop's body once."""
    inner = [sub for eqn in jaxpr.eqns for sub in jex.jaxprs_in_params(eqn.params)]
    return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(map(products, inner))


def test_three_parts_give_the_gradients():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, x, grad = [array(LAYERS, WIDTH, WIDTH)], array(ROWS, WIDTH), array(ROWS, WIDTH)
    shared, scale = [array(ROWS, 1), array(WIDTH)], array(LAYERS, WIDTH)
    layered, carry = [jnp.arange(LAYERS), scale], [x, jnp.int32(0)]
    types = jax.eval_shape(lambda: (params, shared, layered, carry))
    cut = split_backward(layer, *types, ([1], [1]))

    buffers = jax.tree.map(lambda a: jnp.zeros((2, *a.shape), a.dtype), cut.residual)
    row = jnp.int32(1)
    (y, count), kept = cut.forward(params, shared, layered, carry)
    found, stored = cut.inputs(params, shared, layered, kept, [grad], buffers, row)
    assert isinstance(stored, Residual)
    d_params = cut.weights(params, jax.tree.map(lambda b: b[row], stored))

    assert count == sum(range(LAYERS))
    expected, pull = jax.vjp(by_loop, params, shared, scale, x)
    wanted_params, wanted_shared, wanted_scale, wanted_x = pull(grad)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    wanted = [wanted_params[0], wanted_shared[1], wanted_scale, wanted_x]
    ((d_gain,), (d_scale,), (d_x,)) = found
    for a, b in zip([d_params[0], d_gain, d_scale, d_x], wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    made = [
        jax.make_jaxpr(cut.forward)(params, shared, layered, carry),
        jax.make_jaxpr(cut.inputs)(params, shared, layered, kept, [grad], buffers, row),
        jax.make_jaxpr(cut.weights)(params, jax.tree.map(lambda b: b[row], stored)),
    ]
    assert [products(each.jaxpr) for each in made] == [1, 1, 1]


def test_slot_w_stores_the_two_factors_of_its_product():
    """The layer's input, and the gradient of what the kernel multiplies it to: nothing else."""
    kernel = lambda params, shared, layered, carry: [jnp.tanh(carry[0] @ params[0]) * shared[0]]
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params, x = [array(LAYERS, WIDTH, WIDTH)], [array(ROWS, WIDTH)]
    index = [jax.ShapeDtypeStruct((LAYERS,), jnp.int32)]
    cut = split_backward(kernel, params, [array(ROWS, 1)], index, x, ([], []))
    assert [a.shape for a in cut.residual.layers] == [(LAYERS, ROWS, WIDTH)] * 2
    assert cut.residual.once == []


def test_what_elementwise_functions_lead_to_is_not_stored():
    def fn(x, w):
        hidden = x @ w  # [4, 16]: a product is stored, not computed again
        mean = jnp.mean(hidden, axis=1, keepdims=True)
        return jax.nn.gelu(hidden), jnp.tanh(hidden - mean), jnp.exp(x[:, :1])

    program = flatten(jax.make_jaxpr(fn)(jnp.ones((4, 8)), jnp.ones((8, 16))))
    product = next(e for e in program.eqns if e.primitive.name == "dot_general").outvars[0]
    mean = next(e for e in program.eqns if e.primitive.name == "reduce_sum").outvars[0]
    nbytes = lambda v: v.aval.size * v.aval.dtype.itemsize
    given = set(program.invars)
    found = least_storage(program.eqns, given, program.outvars, nbytes)
    assert product in found
    assert sum(map(nbytes, found)) == nbytes(product) + nbytes(mean)
    # Where all that is wanted is smaller than what it was made of, it is stored itself.
    small = least_storage(program.eqns, set(), program.outvars[2:], nbytes)
    assert small == {program.outvars[2]}
