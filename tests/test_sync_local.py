"""Local SGD, FedAvg, DiLoCo and gossip against the same algorithms written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from sync_models import BATCH, TENSOR, assert_close, init, large, loss, make_plan, train

import shardtrain as st
from shardtrain.errors import StrategyError
from shardtrain.planner.traffic import total_wire_bytes

RATE = 0.2
SGD = optax.sgd(RATE)
GRAD = jax.jit(jax.grad(lambda p, batch: loss(p, batch).value))


def rows_of(replica, count):
    size = 32 // count
    part = slice(replica * size, (replica + 1) * size)
    return {name: jnp.asarray(x[part]) for name, x in BATCH.items()}


def local_by_hand(count, steps, rates=(), pulls=(), start=None, anchor=None):
    """Each replica's parameters after some steps on its own rows."""
    rates, pulls = rates or (1.0,) * count, pulls or (0.0,) * count
    start = start or [init(jax.random.key(0))] * count
    anchor = anchor or init(jax.random.key(0))
    found = []
    for r, params in enumerate(start):
        for _ in range(steps):
            grads = GRAD(params, rows_of(r, count))
            params = jax.tree.map(
                lambda p, g, a, r=r: p - RATE * rates[r] * (g + pulls[r] * (p - a)),
                params,
                grads,
                anchor,
            )
        found.append(params)
    return found


def mean_of(trees, weights):
    total = sum(weights)
    return jax.tree.map(
        lambda *xs: sum(w / total * x for w, x in zip(weights, xs, strict=True)), *trees
    )


def examples(count):
    return [float(rows_of(r, count)["mask"].sum()) for r in range(count)]


def test_averaging_every_step_is_all_reduce(devices):
    """Plain SGD from common parameters: the mean of the steps is the step of the mean."""
    state, history = train(make_plan(st.Strategy(data=8, sync=st.LocalSGD(1)), SGD))
    wanted, losses = train(make_plan("data=8", SGD))
    assert_close(state.params, wanted.params)
    for mine, theirs in zip(history, losses, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_fedavg_weighs_by_examples(devices):
    assert examples(4) == [6.0, 6.0, 7.0, 6.0]
    plan = make_plan(st.Strategy(data=4, sync=st.LocalSGD(3)), SGD, devices=devices[:4])
    state, _ = train(plan, 3)
    assert_close(state.params, mean_of(local_by_hand(4, 3), examples(4)))
    equal = st.Strategy(data=4, sync=st.LocalSGD(3, weighting="equal"))
    state, _ = train(make_plan(equal, SGD, devices=devices[:4]), 3)
    assert_close(state.params, mean_of(local_by_hand(4, 3), [1.0] * 4))


def test_learning_rates_and_proximal_terms_per_replica(devices):
    rates, pulls = (1.0, 0.5, 2.0, 0.0), (0.0, 3.0, 0.5, 1.0)
    sync = st.LocalSGD(3, learning_rates=rates, proximal=pulls)
    state, _ = train(make_plan(st.Strategy(data=4, sync=sync), SGD, devices=devices[:4]), 3)
    wanted = mean_of(local_by_hand(4, 3, rates, pulls), examples(4))
    assert_close(state.params, wanted)
    with pytest.raises(StrategyError, match="4 numbers for 8 replicas"):
        train(make_plan(st.Strategy(data=8, sync=sync), SGD), 1)


def test_privacy_clips_each_change_and_adds_noise_to_their_mean(devices):
    """DP-FedAvg by hand, with optax's own noise; without noise and clipping it is local SGD."""

    def trained(privacy, steps=3):
        sync = st.LocalSGD(3, weighting="equal", privacy=privacy)
        plan = make_plan(st.Strategy(data=4, sync=sync), SGD, devices=devices[:4])
        return train(plan, steps)[0].params

    first = init(jax.random.key(0))
    changes = [jax.tree.map(jnp.subtract, first, p) for p in local_by_hand(4, 3)]
    norms = [float(jnp.sqrt(sum(jnp.sum(x**2) for x in c.values()))) for c in changes]
    clip = sorted(norms)[1] * 1.01  # two of four are clipped
    scales = [min(1.0, clip / norm) for norm in norms]
    assert sum(s < 1 for s in scales) == 2
    pairs = zip(changes, scales, strict=True)
    clipped = mean_of([{n: x * s for n, x in c.items()} for c, s in pairs], [1.0] * 4)
    assert_close(trained(st.Privacy(clip, 0.0)), jax.tree.map(jnp.subtract, first, clipped))
    assert_close(trained(st.Privacy(1e6, 0.0)), mean_of(local_by_hand(4, 3), [1.0] * 4))
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *changes)
    key = jax.random.fold_in(jax.random.key(7), 3)
    noised = optax.contrib.differentially_private_aggregate(clip, 0.5, key)
    mean, _ = noised.update(stacked, noised.init(stacked))
    wanted = jax.tree.map(jnp.subtract, first, mean)
    assert_close(trained(st.Privacy(clip, 0.5, seed=7)), wanted)
    other = trained(st.Privacy(clip, 0.5, seed=8))
    assert max(float(jnp.max(jnp.abs(other[n] - wanted[n]))) for n in wanted) > 0.01 * clip


def test_privacy_budget_and_what_would_break_it(devices):
    """10 rounds, z = 5, delta = 1e-5: rho = T / (2 z^2), epsilon = rho + 2 sqrt(rho ln 1/delta)."""
    rho = 10 / 50
    wanted = rho + 2 * (rho * 11.512925) ** 0.5
    assert st.Privacy(1.0, 5.0).epsilon(10, 1e-5) == pytest.approx(wanted, rel=1e-6)
    assert st.Privacy(1.0, 0.0).epsilon(10, 1e-5) == float("inf")
    text = "data=8,sync=LocalSGD(2, weighting='equal', privacy=Privacy(1.0, 0.5))"
    s = st.Strategy.parse(text)
    assert s == st.Strategy.from_json(s.to_json())
    with pytest.raises(StrategyError, match='use weighting="equal"'):
        st.LocalSGD(2, privacy=st.Privacy(1.0, 1.0))
    with pytest.raises(StrategyError, match="give a norm > 0"):
        st.Privacy(0.0, 1.0)
    with pytest.raises(StrategyError, match="unclipped"):
        s.replace(compression=st.Int8())

    class WithStatistics(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    batch = {"x": jax.ShapeDtypeStruct((16, 4), jnp.float32)}
    made = lambda rngs: WithStatistics(rngs)
    loss_fn = lambda model, batch: st.Mean(jnp.sum(model(batch["x"])), batch["x"].shape[0])
    with pytest.raises(StrategyError, match="norm/mean is averaged without noise"):
        st.plan(made, loss_fn, SGD, batch, s)


def test_between_exchanges_parameters_are_the_last_agreed(devices):
    plan = make_plan(st.Strategy(data=4, sync=st.LocalSGD(3)), SGD, devices=devices[:4])
    start = plan.init(0)
    first = jax.tree.map(np.asarray, start.params)
    state, _ = train(plan, 2, start)
    assert_close(state.params, first, 0, 0)
    for r, wanted in enumerate(local_by_hand(4, 2)):
        own = jax.tree.map(lambda x, r=r: np.asarray(x)[r], state.sync.copies["params"])
        assert_close(own, wanted)


def test_diloco_takes_outer_nesterov_steps(devices):
    """Two rounds of arXiv:2311.08105, algorithm 1."""
    sync = st.DiLoCo(2, st.Nesterov(0.5, 0.8))
    state, _ = train(make_plan(st.Strategy(data=4, sync=sync), SGD, devices=devices[:4]), 4)
    anchor = init(jax.random.key(0))
    velocity = jax.tree.map(jnp.zeros_like, anchor)
    for _ in range(2):
        mean = mean_of(local_by_hand(4, 2, start=[anchor] * 4), [1.0] * 4)
        delta = jax.tree.map(jnp.subtract, anchor, mean)
        velocity = jax.tree.map(lambda v, d: 0.8 * v + d, velocity, delta)
        anchor = jax.tree.map(lambda a, d, v: a - 0.5 * (d + 0.8 * v), anchor, delta, velocity)
    assert_close(state.params, anchor)


def test_fragments_take_turns(devices):
    """Three arrays in three fragments, every 6 steps each: one after steps 2, 4 and 6."""
    sync = st.DiLoCo(6, optax.sgd(1.0), fragments=3)
    plan = make_plan(st.Strategy(data=2, sync=sync), SGD, devices=devices[:2])
    state, before, changed = plan.init(0), None, []
    for _ in range(12):
        before = jax.tree.map(np.asarray, state.params)
        state, _ = plan.step(state, BATCH)
        changed.append([n for n in before if (np.asarray(state.params[n]) != before[n]).any()])
    once = [[], ["bias"], [], ["down"], [], ["up"]]
    assert changed == once * 2
    bias = jax.tree.map(np.asarray, state.sync.copies["params"]["bias"])
    assert (bias[0] != bias[1]).any()


@pytest.mark.parametrize(
    ("sync", "compression", "every"),
    [
        (st.LocalSGD(8), None, 8),
        (st.DiLoCo(100), st.Int4(), 100),
        (st.DiLoCo(100, fragments=2), st.Int8(), 100),
        (st.Gossip(4), None, 4),
    ],
    ids=str,
)
def test_collectives_say_how_rarely_they_run(devices, sync, compression, every):
    plan = make_plan(st.Strategy(data=8, sync=sync, compression=compression), SGD)
    found = [c for c in plan.collectives() if c.bytes > 16]
    assert found
    assert {c.every for c in found} == {every}
    scalars = [c for c in plan.collectives() if c.bytes <= 16]
    assert sum(c.bytes * c.count for c in scalars) <= 64


def test_diloco_with_4_bits_sends_400_times_less(devices):
    """A model large enough that blocks are not padding: 2 x 256 x 256 numbers."""
    make = lambda key: {"a": jax.random.normal(key, (256, 256)), "b": jnp.zeros((256, 256))}
    fn = lambda v, b: st.Mean(jnp.sum((b["x"] @ v["a"] @ v["b"]) ** 2), b["x"].shape[0])
    batch = {"x": np.ones((8, 256), np.float32)}

    def sent(strategy):
        plan = st.plan(st.Functional(init=make), fn, SGD, batch, strategy)
        return total_wire_bytes(plan.collectives())

    plain = sent("data=8")
    assert plain == pytest.approx(2 * 7 / 8 * 4 * 2**17, rel=1e-3)
    diloco = sent(st.Strategy(data=8, sync=st.DiLoCo(100), compression=st.Int4()))
    assert plain / diloco > 700
    assert plain / sent(st.Strategy(data=8, sync=st.DiLoCo(100), compression=st.Int8())) > 380


def test_compressed_changes_lose_nothing(devices):
    """Agreed parameters plus what is still kept equal the uncompressed average, for one round."""
    make = lambda c: make_plan(st.Strategy(data=8, sync=st.LocalSGD(2), compression=c), SGD)
    exact, _ = train(make(None), 2)
    found, _ = train(make(st.TopK(0.1)), 2)
    kept = {n: np.sum(e, axis=0) for n, e in found.sync.parts["error"][0].items()}
    for name, value in found.params.items():
        np.testing.assert_allclose(value - kept[name], exact.params[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sync", [st.LocalSGD(2), st.DiLoCo(2), st.Gossip(2)], ids=str)
@pytest.mark.parametrize(
    "inside",
    [{"fsdp": 2, "num_microbatches": 2}, {"fsdp": 2, "tensor": 2, "rules": TENSOR}],
    ids=lambda inside: ",".join(inside),
)
def test_inside_a_replica_other_axes_may_split(devices, sync, inside):
    """Two replicas of one device each, and the same two of several devices each."""
    adam = optax.adam(1e-2)
    alone, losses = train(make_plan(st.Strategy(data=2, sync=sync), adam, devices=devices[:2]))
    size = 8 if "tensor" in inside else 4
    plan = make_plan(st.Strategy(data=2, sync=sync, **inside), adam, devices=devices[:size])
    state, history = train(plan)
    copies = lambda s: s.sync.copies["params"]
    assert_close(copies(state), copies(alone), 1e-4, 1e-5)
    for mine, theirs in zip(history, losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_gossip_mixes_neighbours_and_keeps_the_mean(devices):
    plan = make_plan(st.Strategy(data=8, sync=st.Gossip()), SGD)
    state, _ = train(plan, 1)
    own = local_by_hand(8, 1)
    for r in range(8):
        wanted = mean_of([own[r - 1], own[r], own[(r + 1) % 8]], [1.0] * 3)
        found = jax.tree.map(lambda x, r=r: np.asarray(x)[r], state.sync.copies["params"])
        assert_close(found, wanted)
    mean = mean_of(own, [1.0] * 8)
    assert_close(plan.to_checkpoint(state).params, mean)
    assert_close(plan.model(state), mean)
    batch = {k: jnp.asarray(v) for k, v in BATCH.items()}
    assert float(plan.eval_step(state, BATCH)["loss"]) == pytest.approx(
        float(loss(mean, batch).value), rel=1e-5
    )
    sent = [c for c in large(plan) if c[0] == "collective-permute"]
    assert sorted(set(sent)) == [
        ("collective-permute", 128),
        ("collective-permute", 1024),
        ("collective-permute", 2048),
    ]


def test_one_bad_replica_waits_the_others_go_on(devices):
    plan = make_plan(st.Strategy(data=8, sync=st.LocalSGD(4)), SGD)
    bad = dict(BATCH, x=BATCH["x"].copy())
    bad["x"][3] = np.nan  # a row of replica 0
    first = plan.init(0)
    start = np.asarray(first.params["up"]).copy()
    state, metrics = plan.step(first, bad)
    assert float(metrics["skipped"]) == 1
    found = np.asarray(state.sync.copies["params"]["up"])
    assert (found[0] == start).all()
    assert all((found[r] != start).any() for r in range(1, 8))
    assert np.asarray(state.sync.parts["weight"])[0] == 0.0


@pytest.mark.parametrize(
    ("sync", "compression"),
    [(st.LocalSGD(2), None), (st.DiLoCo(4, fragments=2), st.Int8()), (st.Gossip(2), None)],
    ids=str,
)
def test_resume_is_exact(devices, tmp_path, sync, compression):
    strategy = st.Strategy(data=4, fsdp=2, sync=sync, compression=compression)
    plan, data = make_plan(strategy), st.DataLoader(dict(BATCH), 32)
    straight = st.fit(plan, data, 5, progress=False)
    st.fit(plan, data, 3, tmp_path, progress=False)
    resumed = st.fit(plan, data, 5, tmp_path, progress=False)
    assert_close(straight.state.sync, resumed.state.sync, 0, 0)
    agreed = lambda result: plan.to_checkpoint(result.state).params
    assert_close(agreed(straight), agreed(resumed), 0, 0)


def test_on_fewer_replicas_all_start_from_the_mean(devices, tmp_path):
    make = lambda n: make_plan(
        st.Strategy(data=n, sync=st.DiLoCo(4)), optax.adam(1e-2), devices=devices[:n]
    )
    state, _ = train(make(8), 3)
    with st.Checkpointer(tmp_path, make(8)) as saver:
        saver.save(state)
    plan = make(2)
    with st.Checkpointer(tmp_path, plan) as saver:
        found = saver.restore()
    for path in ("up", "bias", "down"):
        old = np.asarray(state.sync.copies["params"][path])
        new = np.asarray(found.sync.copies["params"][path])
        np.testing.assert_allclose(new, [old.mean(axis=0)] * 2, rtol=1e-6, atol=1e-7)
    assert np.asarray(found.sync.copies["opt_state"][0].count).tolist() == [3, 3]
    weight = lambda s: np.asarray(s.sync.parts["weight"]).sum()
    assert weight(found) == weight(state) == 3 * 25
    assert_close(found.params, state.params, 0, 0)
    plan.step(found, BATCH)


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


def test_replicas_have_their_own_statistics_and_dropout(devices, tmp_path):
    fn = lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"])
    same = {n: np.repeat(x[:4], 8, axis=0) for n, x in BATCH.items()}
    same["x"] = np.tile(BATCH["x"][:4], (8, 1))  # every replica sees the same four rows
    plan = st.plan(Noisy, fn, SGD, same, st.Strategy(data=8, sync=st.LocalSGD(2)))
    state, _ = plan.step(plan.init(0), same)
    kernels = np.asarray(state.sync.copies["params"]["down"]["kernel"])
    assert len({k.tobytes() for k in kernels}) == 8  # dropout: eight different masks
    state, _ = plan.step(state, same)
    means = np.asarray(state.sync.copies["variables"]["norm"]["mean"])
    assert (means == means[0]).all()
    np.testing.assert_array_equal(means[0], np.asarray(state.variables["norm"]["mean"]))
    with st.Checkpointer(tmp_path, plan) as saver:
        saver.save(state)
        found = saver.restore()
    key = lambda s: np.asarray(
        jax.random.key_data(s.sync.copies["variables"]["drop"]["rngs"]["key"])
    )
    np.testing.assert_array_equal(key(found), key(state))
    assert len(np.unique(key(found), axis=0)) == 8


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 8, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_stages_inside_a_replica(devices, tmp_path):
    """The same two replicas with and without a pipeline inside; checkpoints are whole."""
    fn = lambda model, batch: st.cross_entropy(model(batch["x"]), batch["y"], batch["mask"])
    base = st.Strategy(data=2, num_microbatches=2, sync=st.DiLoCo(2), compression=st.Int8())
    make = lambda s, n: st.plan(Layers, fn, optax.adam(1e-2), BATCH, s, devices=devices[:n])
    _, losses = train(make(base, 2), 3)
    plan = make(base.replace(pipeline=2), 4)
    state, history = train(plan, 3)
    for mine, theirs in zip(history, losses, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    with st.Checkpointer(tmp_path, plan) as saver:
        saver.save(state)
        assert_close(saver.restore().sync, state.sync, 0, 0)
