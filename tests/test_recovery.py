"""Bad steps, going back, snapshots, replicas that differ: what `st.fit` does about them."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from recovery_models import Network, loss_fn

import shardtrain as st
from shardtrain.errors import ReplicaDivergenceError, ShardtrainError, UnstableRunError
from shardtrain.monitoring import bad_steps
from shardtrain.monitoring.guard import LossGuard, judge
from shardtrain.recovery.preflight import run_facts
from shardtrain.recovery.saved import _folder

ROWS = 16
STEPS = 12
WATCHFUL = LossGuard(window=4)


def columns(bad=(), value=np.nan):
    """192 examples in reading order: batch k is rows 16 k to 16 k + 15; some batches are bad."""
    random = np.random.default_rng(0)
    x = random.normal(size=(STEPS * ROWS, 8)).astype("float32")
    y = (x @ random.normal(size=(8, 4))).argmax(-1).astype("int32")
    for step in bad:
        x[(step - 1) * ROWS + 3] = value
    return {"x": x, "y": y}


def loader(bad=(), value=np.nan):
    return st.DataLoader(columns(bad, value), ROWS, shuffle=False)


@pytest.fixture(scope="module")
def plan(devices):
    batch = loader().abstract_batch
    return st.plan(Network, loss_fn, optax.adam(1e-2), batch, "data=4,fsdp=2")


def fit(plan, loader, directory=None, steps=STEPS, **options):
    return st.fit(plan, loader, steps, directory, progress=False, **options)


def same(a, b):
    """Whether two states hold the same bits, counters and optimizer included."""
    data = lambda x: (
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(data(x)).tobytes() == np.asarray(data(y)).tobytes() for x, y in pairs)


@pytest.fixture(scope="module")
def without(plan):
    """The clean run that leaves out the given steps; each is made once."""
    made = {}

    def run(*steps):
        if steps not in made:
            made[steps] = fit(plan, loader(), skip_steps=steps)
        return made[steps]

    return run


# -- the judgement ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "recent", "verdict"),
    [
        ({"loss": np.nan, "skipped": 1, "weight": 8}, [], "not finite"),
        ({"loss": np.nan, "skipped": 1, "weight": 0}, [], None),
        ({"loss": 9.0, "skipped": 0, "weight": 8}, [2, 2, 2], None),
        ({"loss": 9.0, "skipped": 0, "weight": 8}, [2, 2.1, 2, 1.9], "spike"),
        ({"loss": 2.39, "skipped": 0, "weight": 8}, [2, 2.1, 2, 1.9], None),
        ({"loss": 2.41, "skipped": 0, "weight": 8}, [2, 2.1, 2, 1.9], "spike"),
        ({"loss": 2.07, "skipped": 0, "weight": 8}, [2, 2, 2, 2], None),
        ({"loss": 2.09, "skipped": 0, "weight": 8}, [2, 2, 2, 2], "spike"),
        ({"loss": 0.1, "skipped": 0, "weight": 8}, [2, 2, 2, 2], None),
    ],
)
def test_judgements(metrics, recent, verdict):
    assert judge(WATCHFUL, metrics, recent) == verdict


def test_without_a_spike_rule_only_what_is_not_finite_is_bad():
    huge = {"loss": 1e9, "skipped": 0, "weight": 8}
    assert judge(LossGuard(spike=None, window=2), huge, [1.0, 1.0]) is None


@pytest.mark.parametrize("wrong", [{"spike": 0}, {"window": 1}, {"patience": 0}])
def test_guards_that_make_no_sense(wrong):
    with pytest.raises(ShardtrainError, match=next(iter(wrong))):
        LossGuard(**wrong)


def test_a_cut_record_is_left_out_and_a_strange_one_refused(tmp_path):
    bad = bad_steps.BadStep(7, "spike", 9.5, float("inf"), 4, 4, 0)
    bad_steps.append(tmp_path, bad)
    with (tmp_path / bad_steps.FILE).open("a") as file:
        file.write('{"step": 9, "rea')
    assert bad_steps.read(tmp_path) == {7: bad}
    with (tmp_path / bad_steps.FILE).open("a") as file:
        file.write("\n{}\n")
    with pytest.raises(ShardtrainError, match="line 2 is not a bad step"):
        bad_steps.read(tmp_path)


# -- leaving a batch out ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_equals_one_left_out(plan, without, tmp_path, value):
    found = fit(plan, loader({5}, value), tmp_path)
    assert same(found.state, without(5).state)
    assert int(found.state.skipped) == 1
    record = bad_steps.read(tmp_path)[5]
    assert (record.reason, record.went_back_to, record.replay_from) == ("not finite", None, 0)


def test_a_spike_goes_back_and_equals_a_run_without_its_batch(plan, without, tmp_path, capsys):
    found = fit(plan, loader({8}, 1e4), tmp_path, save_every=3, guard=WATCHFUL)
    assert same(found.state, without(8).state)
    assert [h["step"] for h in found.history] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert [h["loss"] for h in found.history] == [h["loss"] for h in without(8).history]
    assert "step 8: spike" in capsys.readouterr().out
    assert bad_steps.read(tmp_path)[8].went_back_to == 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == [h["step"] for h in found.history]


def test_memory_is_asked_before_the_disk_and_is_freed_at_the_end(plan, without, tmp_path):
    found = fit(plan, loader({8}, 1e4), tmp_path, save_every=3, snapshot_every=1, guard=WATCHFUL)
    assert same(found.state, without(8).state)
    assert bad_steps.read(tmp_path)[8].went_back_to == 7
    assert list(_folder(tmp_path).iterdir()) == []


def test_a_run_without_any_file_goes_back_too(plan, without):
    found = fit(plan, loader({8}, 1e4), snapshot_every=2, guard=WATCHFUL)
    assert same(found.state, without(8).state)


def test_without_anything_saved_a_spike_is_told_and_taken(plan, capsys):
    found = fit(plan, loader({8}, 1e4), guard=WATCHFUL)
    assert "step 8: spike (loss" in capsys.readouterr().out
    assert int(found.state.skipped) == 0
    assert len(found.history) == STEPS


def test_a_resumed_run_leaves_out_the_same_steps(plan, without, tmp_path):
    for steps in (6, 9, STEPS):
        found = fit(plan, loader({5, 8}), tmp_path, steps=steps)
    assert same(found.state, without(5, 8).state)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(tmp_path / bad_steps.FILE, again)
    assert same(fit(plan, loader(), again).state, found.state)


def test_spikes_are_judged_alike_after_a_resume(plan, without, tmp_path):
    fit(plan, loader({8}, 1e4), tmp_path, steps=6, guard=WATCHFUL)
    found = fit(plan, loader({8}, 1e4), tmp_path, guard=WATCHFUL)
    assert same(found.state, without(8).state)


def test_the_checkpoint_to_replay_from_outlives_retention(plan, tmp_path):
    fit(plan, loader({5}), tmp_path, save_every=2, max_to_keep=1)
    assert st.Checkpointer(tmp_path, plan).steps() == [4, 12]
    assert bad_steps.read(tmp_path)[5].replay_from == 4


def test_replicas_that_step_on_their_own_all_leave_it_out(tmp_path, devices):
    strategy = st.Strategy(data=4, fsdp=2, sync=st.LocalSGD(sync_every=2))
    plan = st.plan(Network, loss_fn, optax.adam(1e-2), loader().abstract_batch, strategy)
    found = fit(plan, loader({5}), tmp_path, save_every=2)
    assert bad_steps.read(tmp_path)[5].went_back_to == 4
    assert same(found.state, fit(plan, loader(), skip_steps={5}).state)


# -- going back further, and giving up ----------------------------------------------------------


class Breaking:
    """A plan whose state is broken once, after a step: as a wrong bit in memory would do it."""

    def __init__(self, plan, after):
        self._plan, self._after = plan, after

    def __getattr__(self, name):
        return getattr(self._plan, name)

    def step(self, state, batch):
        state, metrics = self._plan.step(state, batch)
        if self._after is not None and int(state.step) == self._after:
            self._after = None
            state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
        return state, metrics


def test_a_broken_state_is_left_behind(plan, without, tmp_path):
    found = fit(Breaking(plan, after=7), loader(), tmp_path, save_every=2)
    assert sorted(bad_steps.read(tmp_path)) == [8, 9, 10]
    assert bad_steps.read(tmp_path)[10].went_back_to == 6
    assert same(found.state, without(8, 9, 10).state)


def test_a_state_that_was_broken_before_it_was_saved_is_left_behind_too(plan, without, tmp_path):
    found = fit(Breaking(plan, after=6), loader(), tmp_path, save_every=2)
    assert bad_steps.read(tmp_path)[9].went_back_to == 6  # no use
    assert bad_steps.read(tmp_path)[12].went_back_to == 4
    assert same(found.state, without(7, 8, 9, 10, 11, 12).state)


def test_no_checkpoint_is_made_of_a_doubtful_state(plan, tmp_path):
    fit(plan, loader({4, 5}), tmp_path, save_every=4, max_to_keep=None)
    assert st.Checkpointer(tmp_path, plan).steps() == [6, 8, 12]


def test_nothing_helps_ends_with_one_error(plan, tmp_path):
    bad = set(range(5, STEPS + 1))
    with pytest.raises(
        UnstableRunError, match=r"went back 1 times.*shardtrain replay .* --step 10"
    ):
        fit(plan, loader(bad), tmp_path, save_every=2, guard=LossGuard(max_rollbacks=1))


def test_nothing_to_go_back_to_says_what_to_save(plan):
    with pytest.raises(UnstableRunError, match=r"step 3: not finite.*save_every or snapshot_every"):
        fit(plan, loader({1, 2, 3}))


def test_without_a_guard_bad_steps_are_only_counted(plan, tmp_path):
    found = fit(plan, loader({1, 2, 3, 4}), tmp_path, guard=None)
    assert int(found.state.skipped) == 4
    assert not (tmp_path / bad_steps.FILE).exists()


# -- snapshots ----------------------------------------------------------------------------------


class Dies(st.Callback):
    def __init__(self, at):
        self.at = at

    def on_step(self, step, metrics):
        if step == self.at:
            raise RuntimeError("died")


def test_a_run_that_died_goes_on_from_memory(plan, without, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="died"):
        fit(plan, loader(), tmp_path, snapshot_every=2, callbacks=[Dies(9)])
    assert st.Checkpointer(tmp_path, plan).latest() is None
    found = st.fit(plan, loader(), STEPS, tmp_path, snapshot_every=2)
    assert "resumed at step 8 (from memory)" in capsys.readouterr().out
    assert [h["step"] for h in found.history] == [9, 10, 11, 12]
    assert same(found.state, without().state)


def test_an_emptied_run_directory_starts_anew(plan, tmp_path):
    with pytest.raises(RuntimeError, match="died"):
        fit(plan, loader(), tmp_path / "run", snapshot_every=2, callbacks=[Dies(9)])
    shutil.rmtree(tmp_path / "run")
    found = fit(plan, loader(), tmp_path / "run", snapshot_every=2, steps=2)
    assert [h["step"] for h in found.history] == [1, 2]


def test_memory_that_is_full_ends_the_snapshots_not_the_run(
    plan, without, tmp_path, capsys, monkeypatch
):
    def full(self, blob):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    found = fit(plan, loader(), snapshot_every=2)
    assert same(found.state, without().state)
    assert capsys.readouterr().out.count("Snapshots end here") == 1


# -- replicas -----------------------------------------------------------------------------------


class Flips(Breaking):
    """One bit flips in the copy of one device, once."""

    def step(self, state, batch):
        state, metrics = self._plan.step(state, batch)
        if self._after is not None and int(state.step) == self._after:
            self._after = None
            params = dict(state.params)
            params["down"] = params["down"] | {"bias": flip(params["down"]["bias"], device=5)}
            state = state.replace(params=params)
        return state, metrics


def flip(array, device):
    copies = []
    for shard in array.addressable_shards:
        data = np.asarray(shard.data).copy()
        if shard.device.id == device:
            data.view(np.uint32)[0] ^= 1
        copies.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)


def test_copies_that_differ_stop_the_run_and_distrust_what_was_saved_since(plan, without, tmp_path):
    options = {"save_every": 2, "check_replicas_every": 4, "max_to_keep": None}
    with pytest.raises(ReplicaDivergenceError) as stopped:
        fit(Flips(plan, after=5), loader(), tmp_path, **options)
    message = str(stopped.value)
    assert "at step 8" in message
    assert "params/down/bias: cpu:5 (process 0) of 4 copies differ" in message
    assert "equal at step 4" in message
    assert (tmp_path / "6.suspect").is_dir()
    assert st.Checkpointer(tmp_path, plan).steps() == [2, 4]
    assert same(fit(plan, loader(), tmp_path, **options).state, without().state)


# -- before the first step ----------------------------------------------------------------------


def test_facts_that_all_processes_must_share_include_program_and_settings(plan):
    settings = {"num_steps": STEPS}
    facts = run_facts(plan, {"data": loader()}, settings)
    assert facts == run_facts(plan, {"data": loader()}, settings)
    assert set(facts) >= {"jax", "jaxlib", "num_steps", "program", "strategy", "data fingerprint"}
    batch = loader().abstract_batch
    half = lambda model, batch: st.cross_entropy(0.5 * model(batch["x"]), batch["y"])
    other = st.plan(Network, half, optax.adam(1e-2), batch, "data=4,fsdp=2")
    found = run_facts(other, {"data": loader()}, settings)
    assert [name for name in facts if facts[name] != found[name]] == ["program"]


def test_addresses_of_host_callbacks_do_not_count(devices):
    def noisy(model, batch):
        jax.debug.callback(lambda: None)
        return loss_fn(model, batch)

    batch = loader().abstract_batch
    one, two = (
        st.plan(Network, noisy, optax.adam(1e-2), batch, "data=8").program_text() for _ in range(2)
    )
    assert "callback" in one
    assert one == two
