"""The step: exact averages over every split, skipping, clipping, one trace, donation, batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

import shardtrain as st
from shardtrain.errors import BatchError, LossContractError, ShardtrainError, StrategyError
from shardtrain.pytree import leaves_by_path

ROWS, LENGTH, WIDTH = 16, 4, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
Y = RNG.normal(size=(ROWS, LENGTH)).astype(np.float32)
W = RNG.normal(size=(WIDTH,)).astype(np.float32)
GRADIENT = optax.chain(optax.trace(decay=0.0), optax.sgd(0.1))
"""Plain SGD that keeps the gradient it was given as its state."""


def regression(variables, batch):
    error = (batch["x"] @ variables["w"] - batch["y"]) ** 2
    mask = batch["mask"]
    wrong = st.Mean(jnp.sum((error > 1) * mask), jnp.sum(mask))
    return st.Mean(jnp.sum(error * mask), jnp.sum(mask)), {"wrong": wrong}


def batch_of(mask) -> dict[str, np.ndarray]:
    return {"x": X, "y": Y, "mask": np.asarray(mask, np.float32)}


FULL = batch_of(np.ones((ROWS, LENGTH)))


def plan_of(strategy: str, optimizer=GRADIENT, loss=regression, **options):
    model = st.Functional(init=lambda key: {"w": jnp.asarray(W)})
    return st.plan(model, loss, optimizer, FULL, strategy, **options)


def numpy(leaf) -> np.ndarray:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def host(state) -> dict[str, np.ndarray]:
    return {path: numpy(leaf) for path, leaf in leaves_by_path(state).items()}


SPLITS = (
    "data=8",
    "fsdp=8",
    "data=2,fsdp=4,num_microbatches=2",
    "data=4,fsdp=2,zero=1,num_microbatches=2",
    "data=2,fsdp=2,zero=2,tensor=2,num_microbatches=4",
    "data=4,context=2,num_microbatches=4",
)


@pytest.fixture(scope="module", params=SPLITS)
def split(request, devices):
    plan = plan_of(request.param)
    return plan, plan.init(0)


masks = hs.lists(hs.integers(0, LENGTH), min_size=ROWS, max_size=ROWS)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(masks, hs.booleans())
def test_every_split_averages_over_unmasked_tokens(split, lengths, one_part_empty):
    """Against the closed form in float64: loss, metric, gradient, norm; ragged masks."""
    plan, first = split
    lengths = np.array(lengths)
    if one_part_empty:  # rows 0, M, 2M, ... are the first microbatch
        lengths[:: plan.strategy.num_microbatches] = 0
    mask = np.arange(LENGTH)[None] < lengths[:, None]
    state, metrics = plan.step(jax.tree.map(jnp.copy, first), batch_of(mask))
    error = X.astype(np.float64) @ W - Y
    weight = mask.sum()
    grad = 2 * np.einsum("bl,blw->w", error * mask, X) / max(weight, 1)
    loss = (error**2 * mask).sum() / max(weight, 1)
    assert float(metrics["weight"]) == weight
    assert int(metrics["skipped"]) == int(weight == 0)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-5)
    wrong = ((error**2 > 1) * mask).sum() / max(weight, 1)
    np.testing.assert_allclose(metrics["wrong"], wrong, rtol=1e-5)
    kept = np.zeros(WIDTH) if weight == 0 else grad
    found = np.asarray(state.opt_state[0].trace["w"])
    np.testing.assert_allclose(found, kept, atol=1e-5 * max(np.linalg.norm(grad), 1))
    np.testing.assert_allclose(state.params["w"], W - 0.1 * kept, rtol=1e-5, atol=1e-6)
    assert plan.trace_counts["step"] == 1


# -- steps that must change nothing -------------------------------------------------------------


class Everything(nnx.Module):
    """Parameters, batch statistics, an integer counter and an rng."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def masked(model, batch):
    y = model(batch["x"]).mean(-1) - batch["y"]
    return st.Mean(jnp.sum(y**2 * batch["mask"]), jnp.sum(batch["mask"]))


@pytest.mark.parametrize("bad", ["nan", "inf", "masked"])
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(everything, bad):
    plan = everything
    batch = dict(FULL)
    if bad == "masked":
        batch["mask"] = np.zeros_like(batch["mask"])
    else:
        batch["x"] = X.copy()
        batch["x"][3, 1, 2] = float(bad)
    state, _ = plan.step(plan.init(0), FULL)
    before = host(state)
    state, metrics = plan.step(state, batch)
    after = host(state)
    moved = {p for p in before if not np.array_equal(before[p], after[p])}
    assert moved == {"step", "skipped"}  # as if the batch had not been there
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)
    state, metrics = plan.step(state, FULL)
    assert (int(state.skipped), int(metrics["skipped"])) == (1, 0)
    assert np.isfinite(float(metrics["loss"]))
    assert plan.trace_counts["step"] == 1


@pytest.fixture(scope="module")
def everything(devices):
    return st.plan(Everything, masked, optax.adam(1e-2), FULL, "data=4,fsdp=2")


def test_eval_uses_running_statistics_no_dropout_and_changes_nothing(everything):
    plan = everything
    state, _ = plan.step(plan.init(0), FULL)
    before = host(state)
    one, two = (plan.eval_step(state, FULL) for _ in range(2))
    assert float(one["loss"]) == float(two["loss"])
    assert float(one["weight"]) == ROWS * LENGTH
    module = plan.model(state)
    module.eval()
    np.testing.assert_allclose(one["loss"], masked(module, FULL).value, rtol=1e-5)
    out = plan.call(state, lambda model, x: model(x), X)
    np.testing.assert_allclose(out, module(X), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, host(state))
    assert dict(plan.trace_counts).get("eval_step") == 1


# -- one trace ----------------------------------------------------------------------------------


def test_one_trace_over_steps_eval_and_restored_states(devices):
    plan = plan_of("data=2,fsdp=4,num_microbatches=2", optax.adamw(1e-3))
    state = plan.init(0)
    for _ in range(3):
        state, _ = plan.step(state, FULL)
    plan.eval_step(state, FULL)
    state, _ = plan.step(state, {k: jnp.asarray(v) for k, v in FULL.items()})
    # A state made by another path: from host arrays, put where the plan says.
    shapes = plan.abstract_state
    raw = jax.tree.map(numpy, state)
    restored = jax.tree.map(
        lambda x, s: (
            jax.device_put(jax.random.wrap_key_data(x), s.sharding)
            if s.dtype == shapes.rng.dtype
            else jax.device_put(x, s.sharding)
        ),
        raw,
        shapes,
    )
    one, _ = plan.step(state, FULL)
    two, _ = plan.step(restored, plan.place(FULL))
    np.testing.assert_array_equal(np.asarray(one.params["w"]), np.asarray(two.params["w"]))
    again, _ = plan.step(plan.init(7), FULL)
    assert int(again.step) == 1
    assert plan.trace_counts["step"] == 1
    assert plan.trace_counts["eval_step"] == 1
    assert plan._jitted_step._cache_size() == 1


def test_shardings_of_the_new_state_are_the_planned_ones(devices):
    plan = plan_of("data=2,fsdp=4,zero=1", optax.adam(1e-3))
    state, _ = plan.step(plan.init(0), FULL)
    planned = leaves_by_path(plan.abstract_state)
    for path, leaf in leaves_by_path(state).items():
        assert leaf.sharding.is_equivalent_to(planned[path].sharding, leaf.ndim), path
        assert len(leaf.sharding.device_set) == 8, path


def test_seeds(devices):
    init = lambda key: {"w": jax.random.normal(key, (WIDTH,))}
    plan = st.plan(st.Functional(init=init), regression, GRADIENT, FULL, "fsdp=8")
    values = [np.asarray(plan.init(seed).params["w"]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.abs(values[0] - values[2]).max() > 0.1
    np.testing.assert_array_equal(values[0], np.asarray(init(jax.random.key(0))["w"]))


# -- the optimizer ------------------------------------------------------------------------------


def test_clipping_equals_optax(devices):
    one = plan_of("data=8,max_grad_norm=0.5")
    two = plan_of("data=8", optax.chain(optax.clip_by_global_norm(0.5), GRADIENT))
    a, metrics = one.step(one.init(0), FULL)
    b, _ = two.step(two.init(0), FULL)
    assert float(metrics["grad_norm"]) > 0.5  # the norm before clipping is reported
    np.testing.assert_allclose(a.params["w"], b.params["w"], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(a.opt_state[0].trace["w"]), 0.5, rtol=1e-6)


def test_a_schedule_counts_optimizer_steps_not_microbatches(devices):
    plan = plan_of("data=2,fsdp=4,num_microbatches=2", optax.sgd(lambda step: 1.0 + step))
    state = plan.init(0)
    sizes = []
    for _ in range(3):
        before = np.asarray(state.params["w"])
        state, metrics = plan.step(state, FULL)
        moved = np.linalg.norm(np.asarray(state.params["w"]) - before)
        sizes.append(moved / float(metrics["grad_norm"]))
    np.testing.assert_allclose(sizes, [1.0, 2.0, 3.0], rtol=1e-4)


def test_an_optimizer_that_wants_the_loss_gets_it(devices):
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, accumulation_size=1)
    plan = plan_of("data=8", optax.chain(optax.sgd(0.0), plateau))
    state = plan.init(0)
    for _ in range(3):
        state, metrics = plan.step(state, FULL)
    found = state.opt_state[1]
    np.testing.assert_allclose(found.best_value, metrics["loss"], rtol=1e-6)
    assert float(found.scale) < 1.0


def test_multi_steps_is_refused_with_the_remedy():
    with pytest.raises(
        StrategyError, match=r"Strategy\(num_microbatches=\.\.\.\) splits the batch"
    ):
        plan_of("data=8", optax.MultiSteps(optax.sgd(0.1), 2), hardware="cpu:8")
    with pytest.raises(StrategyError, match=r"optimizer is a float, not an optax"):
        plan_of("data=8", 0.1, hardware="cpu:8")


# -- random numbers -----------------------------------------------------------------------------


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        w = self.param("w", nn.initializers.ones, x.shape)
        return nn.Dropout(0.5, deterministic=not train)(w)


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones((ROWS, LENGTH)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.w[...])


def functional_noise(variables, batch, rngs):
    return st.Mean(jnp.sum(variables["w"] * jax.random.normal(rngs.noise(), (ROWS, LENGTH))), 1.0)


@pytest.mark.parametrize("kind", ["linen", "nnx", "functional"])
def test_random_masks_are_bit_identical_on_every_layout(devices, kind):
    """The gradient of sum(dropout(w)) is the mask itself."""
    model, loss = {
        "linen": (LinenDropout(), lambda m, b: st.Mean(jnp.sum(m(b["y"])), 1.0)),
        "nnx": (NnxDropout, lambda m, b: st.Mean(jnp.sum(m(b["y"])), 1.0)),
        "functional": (
            st.Functional(init=lambda key: {"w": jnp.ones((ROWS, LENGTH))}),
            functional_noise,
        ),
    }[kind]
    found = []
    for strategy in ("data=1", "data=8", "fsdp=8"):
        used = devices[:1] if strategy == "data=1" else devices
        plan = st.plan(model, loss, GRADIENT, FULL, strategy, devices=used)
        state = plan.init(0)
        steps = []
        for _ in range(2):
            state, _ = plan.step(state, FULL)
            steps.append(np.asarray(state.opt_state[0].trace["w"]))
        found.append(steps)
    assert np.abs(found[0][0] - found[0][1]).max() > 0  # another mask in each step
    for steps in found[1:]:
        np.testing.assert_array_equal(steps, found[0])


# -- donation -----------------------------------------------------------------------------------


def test_a_consumed_state_is_named(devices):
    plan = plan_of("data=8")
    old = plan.init(0)
    new, _ = plan.step(old, FULL)
    for use in (
        lambda: plan.step(old, FULL),
        lambda: plan.eval_step(old, FULL),
        lambda: plan.model(old),
        lambda: plan.call(old, lambda v: v["w"]),
    ):
        with pytest.raises(ShardtrainError) as error:
            use()
        assert "consumed by plan.step()" in str(error.value)
        assert "state, metrics = plan.step(state, batch)" in str(error.value)
        assert "donate=False" in str(error.value)
    model = plan.model(new)
    plan.step(new, FULL)
    assert np.isfinite(np.asarray(model["w"])).all()  # copies live on


def test_without_donation_old_states_live_on(devices):
    plan = plan_of("data=8", donate=False)
    old = plan.init(0)
    one, _ = plan.step(old, FULL)
    two, _ = plan.step(old, FULL)
    np.testing.assert_array_equal(np.asarray(one.params["w"]), np.asarray(two.params["w"]))


def test_a_state_of_something_else_is_refused(devices):
    plan = plan_of("data=8")
    with pytest.raises(ShardtrainError, match=r"expected the TrainState of plan\.init, got dict"):
        plan.step({"params": 1}, FULL)


# -- batches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped(devices):
    plan = plan_of("data=8", donate=False)
    return plan, plan.step(plan.init(0), FULL)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": X[:12], "y": Y[:12], "mask": Y[:12]},
            r"x: shape \(16, 4, 8\) planned, \(12, 4, 8\)",
        ),
        ({"y": Y[:, :3]}, r"y: shape \(16, 4\) planned, \(16, 3\) given: pad or crop"),
        ({"y": np.vstack([Y, Y])}, r"y: shape .* split it into batches of 16 rows"),
        ({"y": Y.astype(np.int32)}, r"y: dtype float32 planned, int32 given: cast it"),
        ({"z": Y}, r"another structure than the plan's example batch: unexpected \['z'\]"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_wrong_batches_say_which_leaf(stepped, change, message, first):
    plan, state = stepped
    if first:
        plan = plan_of("data=8")
        state = plan.init(0)
    with pytest.raises(BatchError, match=message):
        plan.step(state, FULL | change)
    with pytest.raises(BatchError, match=message):
        plan.eval_step(state, FULL | change)


def test_a_short_last_batch_says_pad(stepped):
    plan, state = stepped
    with pytest.raises(BatchError, match="pad 4 rows with mask 0"):
        plan.step(state, {k: v[:12] for k, v in FULL.items()})


def test_a_missing_leaf(stepped):
    plan, state = stepped
    with pytest.raises(BatchError, match=r"missing \['mask'\]"):
        plan.step(state, {"x": X, "y": Y})


def test_float64_and_python_lists_are_taken_as_jax_would(stepped):
    plan, state = stepped
    wide = {k: v.astype(np.float64) for k, v in FULL.items()}
    _, metrics = plan.step(state, wide)
    assert np.isfinite(float(metrics["loss"]))
    assert plan.trace_counts["step"] == 1


def test_an_indivisible_batch_is_refused_when_planning():
    batch = {k: v[:12] for k, v in FULL.items()}
    model = st.Functional(init=lambda key: {"w": jnp.asarray(W)})
    with pytest.raises(BatchError, match="Nearest batch sizes that work: 8 or 16"):
        st.plan(model, regression, GRADIENT, batch, "data=8", hardware="cpu:8")


# -- keyword `train` ----------------------------------------------------------------------------


def test_the_train_keyword(devices):
    def loss(variables, batch, train):
        return st.Mean(jnp.sum(variables["w"]) * (2.0 if train else 5.0), 1.0)

    plan = plan_of("data=8", optax.sgd(0.0), loss)
    state, metrics = plan.step(plan.init(0), FULL)
    np.testing.assert_allclose(metrics["loss"], 2 * W.sum(), rtol=1e-5)
    np.testing.assert_allclose(plan.eval_step(state, FULL)["loss"], 5 * W.sum(), rtol=1e-5)


def test_another_loss_for_evaluation(devices):
    eval_loss = lambda variables, batch: st.Mean(jnp.sum(variables["w"]), 2.0)
    plan = plan_of("data=8", optax.sgd(0.0), eval_fn=eval_loss)
    np.testing.assert_allclose(plan.eval_step(plan.init(0), FULL)["loss"], W.sum() / 2, rtol=1e-5)


def test_a_weight_written_as_a_number_is_refused_over_microbatches(devices):
    fixed = lambda v, b: st.Mean(jnp.sum((b["x"] @ v["w"]) ** 2), ROWS)
    with pytest.raises(LossContractError, match="weight 16 for a microbatch as for the whole"):
        plan_of("data=8,num_microbatches=2", loss=fixed, hardware="cpu:8")
    plan_of("data=8", loss=fixed, hardware="cpu:8")
    counted = lambda v, b: st.Mean(jnp.sum((b["x"] @ v["w"]) ** 2), b["x"].shape[0])
    plan_of("data=8,num_microbatches=2", loss=counted, hardware="cpu:8")


def test_a_rule_may_keep_a_batch_leaf_whole(devices):
    batch = FULL | {"weights": np.arange(LENGTH, dtype=np.float32)}

    def loss(v, b):
        return st.Mean(jnp.sum((b["x"] @ v["w"]) ** 2 * b["weights"]), b["x"].shape[0])

    model = st.Functional(init=lambda key: {"w": jnp.asarray(W)})
    strategy = st.Strategy(data=8, rules={"batch/weights": ()})
    plan = st.plan(model, loss, GRADIENT, batch, strategy)
    _, metrics = plan.step(plan.init(0), batch)
    wanted = ((X @ W) ** 2 * batch["weights"]).sum() / ROWS
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
