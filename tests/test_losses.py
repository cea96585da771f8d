import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardtrain as st
from shardtrain.errors import LossContractError
from shardtrain.modules import standardize


def test_mean_adds_sums_and_weights_not_means():
    together = st.Mean(6.0, 3.0) + st.Mean(1.0, 1.0)
    assert (together.total, together.weight) == (7.0, 4.0)
    assert float(together.value) == 1.75


def test_mean_of_nothing_is_zero_with_a_zero_gradient():
    assert float(st.Mean(0.0, 0.0).value) == 0.0
    grad = jax.grad(lambda x: st.Mean(x * 0.0, jnp.float32(0.0)).value)(jnp.float32(2.0))
    assert float(grad) == 0.0


def test_cross_entropy_against_literals():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    loss = st.cross_entropy(logits, jnp.array([[0, 2]]), jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(loss.total, np.log(2.0), rtol=1e-6)
    assert float(loss.weight) == 1.0
    both = st.cross_entropy(logits, jnp.array([[0, 2]]))
    np.testing.assert_allclose(both.total, -np.log(0.5) - np.log(0.8), rtol=1e-6)
    assert float(both.weight) == 2.0


def test_cross_entropy_masks_whole_rows():
    logits, targets = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)
    loss = st.cross_entropy(logits, targets, jnp.array([1, 0]))
    assert float(loss.weight) == 3.0
    np.testing.assert_allclose(loss.total, 3 * np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize("garbage", [np.inf, -np.inf, np.nan])
def test_cross_entropy_ignores_whatever_is_under_the_mask(garbage):
    logits = jnp.array([[0.0, 0.0], [garbage, 0.0]])
    targets, mask = jnp.array([0, -100]), jnp.array([1.0, 0.0])
    total = lambda logits: st.cross_entropy(logits, targets, mask).total
    value, grad = jax.value_and_grad(total)(logits)
    np.testing.assert_allclose(value, np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.5, 0.5], [0.0, 0.0]], atol=1e-6)


def test_cross_entropy_is_float32_for_bf16_logits():
    loss = st.cross_entropy(jnp.zeros((2, 4), jnp.bfloat16), jnp.zeros((2,), jnp.int32))
    assert loss.total.dtype == jnp.float32
    np.testing.assert_allclose(loss.total, 2 * np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "targets", "mask"),
    [((2, 3, 4), (2, 4), None), ((2, 4), (2,), (3,)), ((2, 3, 4), (2, 3), (3,))],
)
def test_cross_entropy_shapes_that_do_not_fit(logits, targets, mask):
    with pytest.raises(LossContractError, match=r"cross_entropy: .*\(2"):
        st.cross_entropy(
            jnp.zeros(logits),
            jnp.zeros(targets, jnp.int32),
            None if mask is None else jnp.ones(mask),
        )


MEAN = st.Mean(jnp.float32(6.0), jnp.float32(3.0))


@pytest.mark.parametrize(
    ("returned", "loss", "metrics"),
    [
        (jnp.float32(2.0), 2.0, {}),
        (2.5, 2.5, {}),
        (np.float32(2.0), 2.0, {}),
        (MEAN, 2.0, {}),
        ((MEAN, {}), 2.0, {}),
        ((jnp.float32(2.0), {"a": MEAN, "b": jnp.float32(5.0)}), 2.0, {"a": 2.0, "b": 5.0}),
        ((MEAN, st.Aux(variables=None, metrics={"a": 1})), 2.0, {"a": 1.0}),
    ],
)
def test_everything_a_loss_may_return(returned, loss, metrics):
    output, variables = standardize(returned, num_parts=1, equal_parts=False)
    assert variables is None
    assert float(output.loss.value) == loss
    assert {k: float(v.value) for k, v in output.metrics.items()} == metrics
    assert output.loss.total.dtype == output.loss.weight.dtype == jnp.float32


def test_aux_hands_variables_on():
    _, variables = standardize((MEAN, st.Aux(variables={"n": 1})), 1, False)
    assert variables == {"n": 1}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (jnp.zeros((3,)), r"an array of shape \(3,\), not a scalar.*st\.Mean\(total, weight\)"),
        (st.Mean(jnp.zeros((3,)), 1.0), r"total of shape \(3,\), not a scalar"),
        (st.Mean(1.0, jnp.ones((2,))), r"weight of shape \(2,\), not a scalar"),
        (jnp.int32(3), "returned dtype int32, not a float"),
        (None, "returned NoneType"),
        ({"loss": 1.0}, "returned dict"),
        ("1.0", "returned str"),
        ((MEAN, [1.0]), "returned list beside the loss"),
        ((MEAN, 1.0, 2.0), "returned tuple"),
        ((MEAN, {"a": jnp.zeros((2,))}), r"metric 'a' returned an array of shape \(2,\)"),
        ((MEAN, {"a": "text"}), "metric 'a' returned str"),
    ],
)
def test_what_a_loss_may_not_return(returned, message):
    with pytest.raises(LossContractError, match=message):
        standardize(returned, num_parts=1, equal_parts=False)


def test_a_bare_scalar_over_microbatches_is_refused_with_the_remedy():
    for returned in (jnp.float32(1.0), (MEAN, {"a": jnp.float32(1.0)})):
        with pytest.raises(LossContractError) as error:
            standardize(returned, num_parts=4, equal_parts=False)
        assert "splits each batch into 4 microbatches" in str(error.value)
        assert "st.Mean(jnp.sum(nll * mask), jnp.sum(mask))" in str(error.value)
        assert "Strategy(equal_microbatches=True)" in str(error.value)
        standardize(returned, num_parts=4, equal_parts=True)
    standardize(MEAN, num_parts=4, equal_parts=False)


def test_the_weight_has_no_gradient():
    """A weight that depends on parameters must not add to their gradient through the sum."""

    def total(x):
        return standardize(st.Mean(x, x), 1, False)[0].loss.weight

    assert float(jax.grad(total)(jnp.float32(2.0))) == 0.0
