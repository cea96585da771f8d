"""DataLoader: global batch = f(seed, step), on any layout, with typed errors."""

import threading

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hst
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardtrain.data import DataLoader, placement
from shardtrain.data.order import Order
from shardtrain.data.prefetch import Prefetcher
from shardtrain.errors import DataError


def mesh(data, tensor):
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"))


def columns(n=50):
    return {"x": np.arange(n, dtype=np.float32)[:, None] * [1, 10], "y": np.arange(n)}


def rows(loader, steps):
    return np.concatenate([loader.batch(step)["y"] for step in steps])


def test_every_example_once_per_epoch_and_a_new_order_in_each():
    loader = DataLoader(columns(50), 10, seed=3)
    first, second = rows(loader, range(5)), rows(loader, range(5, 10))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert [loader.epoch(s) for s in (0, 4, 5, 10)] == [0, 0, 1, 2]


def test_epochs_are_cut_without_dropping_a_remainder():
    loader = DataLoader(columns(7), 3, seed=0)
    seen = rows(loader, range(7))
    assert [sorted(seen[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3


def test_a_batch_depends_on_seed_and_step_only():
    fresh = DataLoader(columns(), 8, seed=1).batch(11)
    used = DataLoader(columns(), 8, seed=1)
    for step in (3, 0, 12):
        used.batch(step)
    np.testing.assert_array_equal(used.batch(11)["x"], fresh["x"])
    assert not np.array_equal(DataLoader(columns(), 8, seed=2).batch(11)["y"], fresh["y"])


def test_the_order_is_a_fixed_one():
    # a change of this literal would silently change what a resumed run sees next
    assert rows(DataLoader(columns(10), 5, seed=7), range(2)).tolist() == ORDER_OF_SEED_7


ORDER_OF_SEED_7 = [7, 9, 0, 8, 4, 2, 5, 6, 3, 1]


@settings(max_examples=30, deadline=None)
@given(
    n=hst.integers(1, 40),
    seed=hst.integers(0, 2**32 - 1),
    start=hst.integers(0, 200),
    parts=hst.integers(1, 4),
)
def test_order_can_be_computed_in_any_pieces(n, seed, start, parts):
    positions = np.arange(start, start + 24)
    whole = Order(n, seed).indices(positions)
    split = [Order(n, seed).indices(piece) for piece in np.array_split(positions, parts)]
    np.testing.assert_array_equal(whole, np.concatenate(split))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 1), PartitionSpec("data")),
        ((4, 2), PartitionSpec("data")),
        ((2, 4), PartitionSpec(("data", "tensor"))),
        ((1, 1), PartitionSpec()),
    ],
)
def test_sharded_batches_equal_the_numpy_batch(shape, spec):
    loader = DataLoader(columns(), 8, seed=5)
    want = DataLoader(columns(), 8, seed=5, prefetch=0)
    for step in (0, 1, 2, 9):
        got = loader.batch(step, NamedSharding(mesh(*shape), spec))
        assert got["x"].sharding.spec == spec
        jax.tree.map(np.testing.assert_array_equal, got, want.batch(step))


def test_feature_dims_shard_too_with_one_sharding_per_leaf():
    m = mesh(4, 2)
    shardings = {
        "x": NamedSharding(m, PartitionSpec("data", "tensor")),
        "y": NamedSharding(m, PartitionSpec("data")),
    }
    loader = DataLoader(columns(), 8, seed=5)
    got = loader.batch(2, shardings)
    assert got["x"].addressable_shards[0].data.shape == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, got, loader.batch(2))


class OneHost:
    """A sharding as the second of two processes sees it: only half of its devices addressable."""

    def __init__(self, sharding):
        self.sharding = sharding

    def addressable_devices_indices_map(self, shape):
        every = self.sharding.devices_indices_map(shape)
        return {d: i for d, i in every.items() if d.id >= 4}


def test_a_process_reads_only_the_rows_of_its_devices():
    loader = DataLoader(columns(), 8)
    sharding = NamedSharding(mesh(4, 2), PartitionSpec("data"))
    theirs = jax.tree.map(lambda _: OneHost(sharding), loader.abstract_batch)
    assert placement.addressable_rows(theirs, loader.abstract_batch).tolist() == [4, 5, 6, 7]
    assert loader.local_rows(sharding).tolist() == list(range(8))


def test_only_needed_rows_are_read_from_the_source(monkeypatch):
    read = []

    class Source:
        def __len__(self):
            return 100

        def __getitem__(self, index):
            read.append(index)
            return {"y": np.int32(index)}

    loader = DataLoader(Source(), 8, seed=1, prefetch=0)
    read.clear()
    got = loader._reader.batch(8, np.array([4, 5]), 3)
    assert read == got["y"].tolist() == loader.batch(3)["y"][4:6].tolist()


# ---------------------------------------------------------------- weights and transform


def test_weights_draw_in_proportion_and_never_a_zero():
    weights = [0.0, 1.0, 3.0, 0.0]
    drawn = rows(DataLoader(columns(4), 400, seed=2, weights=weights), range(10))
    counts = np.bincount(drawn, minlength=4)
    assert counts[0] == counts[3] == 0
    assert 2.6 < counts[2] / counts[1] < 3.4
    again = rows(DataLoader(columns(4), 400, seed=2, weights=weights), range(10))
    np.testing.assert_array_equal(drawn, again)


def test_weighted_batches_may_exceed_the_source():
    loader = DataLoader({"y": np.arange(3)}, 6, weights=[1, 1, 1])
    assert loader.batch(0)["y"].shape == (6,)


def test_transform_with_rng_is_the_same_on_any_layout_and_differs_between_epochs():
    def augment(example, rng):
        return {"x": example["x"] + rng.normal(size=2).astype(np.float32), "y": example["y"]}

    loader = DataLoader(columns(8), 8, seed=4, transform=augment)
    plain = loader.batch(0)
    sharded = loader.batch(0, NamedSharding(mesh(8, 1), PartitionSpec("data")))
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)
    next_epoch = loader.batch(1)

    def noise(batch):
        return (batch["x"] - columns(8)["x"][batch["y"]])[np.argsort(batch["y"])]

    assert np.abs(noise(plain) - noise(next_epoch)).min() > 0


def test_transform_without_rng_keeps_its_defaults():
    loader = DataLoader([1, 2, 3, 4], 4, transform=lambda example, scale=3: {"v": example * scale})
    assert sorted(loader.batch(0)["v"].tolist()) == [3, 6, 9, 12]


# ---------------------------------------------------------------- prefetch


def test_prefetch_gives_what_no_prefetch_gives_in_any_order_of_steps():
    ahead, direct = DataLoader(columns(), 7, seed=9), DataLoader(columns(), 7, seed=9, prefetch=0)
    for step in (0, 1, 2, 3, 7, 8, 9, 2, 3, 100):
        np.testing.assert_array_equal(ahead.batch(step)["y"], direct.batch(step)["y"])


def test_prefetch_reads_ahead_bounded_and_only_under_sequential_access():
    done = []
    reader = Prefetcher(lambda step: done.append(step) or step, depth=2)
    assert reader.get(10) == 10
    reader.get(3)
    reader.close()
    assert done == [10, 3]
    assert [reader.get(4), reader.get(5)] == [4, 5]
    reader.close()  # waits for the read in flight
    assert set(done[2:]) <= {4, 5, 6, 7}


def test_an_error_ahead_is_raised_at_its_own_step_only():
    def read(step):
        if step == 3:
            raise DataError("step 3 is broken")
        return step

    reader = Prefetcher(read, depth=2)
    assert [reader.get(s) for s in (0, 1, 2)] == [0, 1, 2]
    with pytest.raises(DataError, match="step 3 is broken"):
        reader.get(3)
    assert reader.get(4) == 4
    reader.close()


def test_no_thread_outlives_a_loader_that_is_closed_or_dropped():
    def alive():
        return [t for t in threading.enumerate() if t.name.startswith("shardtrain-data")]

    before = len(alive())
    closed = DataLoader(columns(), 5)
    dropped = DataLoader(columns(), 5)
    for loader in (closed, dropped):
        loader.batch(0), loader.batch(1)
    assert len(alive()) == before + 2
    closed.close()
    threads = alive()
    del dropped, loader
    for thread in threads:
        thread.join(timeout=10)
    assert len(alive()) == before


# ---------------------------------------------------------------- evaluation


def test_eval_pads_the_last_batch_with_weight_zero():
    loader = DataLoader(columns(10), 4)
    batches = list(loader.eval_batches())
    assert [b["y"].shape for b, _ in batches] == [(4,)] * 3
    assert np.concatenate([m for _, m in batches]).tolist() == [1.0] * 10 + [0.0] * 2
    seen = np.concatenate([b["y"][m > 0] for b, m in batches])
    assert seen.tolist() == list(range(10))
    assert loader.num_eval_batches == 3


def test_eval_summary_counts_the_padding():
    loader = DataLoader({"x": np.zeros((1003, 1))}, 128)
    assert loader.eval_summary == "eval: 1003 examples (21 padding rows ignored)"


def test_eval_batches_can_be_sharded_with_their_mask():
    loader = DataLoader(columns(10), 8)
    sharding = NamedSharding(mesh(4, 2), PartitionSpec("data", None))
    shardings = {"x": sharding, "y": NamedSharding(mesh(4, 2), PartitionSpec("data"))}
    for (got, mask), (want, ones) in zip(
        loader.eval_batches(shardings), loader.eval_batches(), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, got, want)
        np.testing.assert_array_equal(mask, ones)
        assert mask.dtype == np.float32
        assert mask.sharding.spec == PartitionSpec("data")


# ---------------------------------------------------------------- identity and resume


def test_fingerprint_sees_values_dtype_and_length():
    base = DataLoader(columns(), 5).fingerprint()
    assert DataLoader(columns(), 10, seed=9).fingerprint() == base
    longer, other = columns(51), columns()
    other["x"] = other["x"] + 1
    assert len({base, *(DataLoader(c, 5).fingerprint() for c in (longer, other))}) == 3


def test_resume_refuses_another_data_order():
    saved = DataLoader(columns(), 5, seed=1).describe()
    DataLoader(columns(), 5, seed=1).check_resume(saved)
    with pytest.raises(DataError, match=r"global_batch_size: 5 → 10"):
        DataLoader(columns(), 10, seed=1).check_resume(saved)
    with pytest.raises(DataError, match=r"fingerprint"):
        DataLoader(columns(49), 5, seed=1).check_resume(saved)


# ---------------------------------------------------------------- sources


def test_grain_sources_and_lists_and_arrays_are_sources():
    dataset = grain.MapDataset.range(12).map(lambda i: {"y": np.int32(i)})
    assert sorted(DataLoader(dataset, 12).batch(0)["y"].tolist()) == list(range(12))
    assert sorted(DataLoader(list(range(12)), 12).batch(0).tolist()) == list(range(12))
    assert DataLoader(np.zeros((12, 3)), 12).batch(0).shape == (12, 3)


def test_64_bit_values_are_delivered_in_32_bits_and_must_fit():
    batch = DataLoader(columns(), 4).batch(0)
    assert (batch["x"].dtype, batch["y"].dtype) == (np.float32, np.int32)
    huge = {"y": np.array([1, 2**40])}
    with pytest.raises(DataError, match=r"batch leaf y: .*1099511627776 do not fit in int32"):
        DataLoader(huge, 2).batch(0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list holds no examples"),
        ({}, "holds no columns"),
        ({"x": np.zeros((0, 3))}, "holds no examples"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, r"\['x'\]: 3, \['y'\]: 4"),
        ({"x": np.float32(3)}, "None marks a scalar"),
        ((np.zeros(3), np.zeros(3)), "columns or examples"),
        (iter([1, 2]), "cannot be read by index"),
        (["text", "more"], "str 'text' is not numeric"),
        ([{"a": {}}, {"a": {}}], "no arrays in it"),
        (grain.MapDataset.range(3).repeat(), "infinite"),
    ],
)
def test_unusable_sources_are_refused(source, message):
    with pytest.raises(DataError, match=message):
        DataLoader(source, 2)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": np.zeros(4, np.float32)}, r"example 1, leaf x: float32\[4\].*float32\[3\]"),
        ({"x": np.zeros(3, np.int32)}, r"example 1, leaf x: int32\[3\].*float32\[3\]"),
        ({"z": np.zeros(3, np.float32)}, "example 1 has the structure"),
        ({"x": None}, "example 1 has the structure"),
    ],
)
def test_examples_that_differ_name_index_and_leaf(second, message):
    loader = DataLoader([{"x": np.zeros(3, np.float32)}, second], 2)
    with pytest.raises(DataError, match=message):
        loader.batch(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 6}, "larger than the source .5 examples"),
        ({"global_batch_size": 0}, "at least 1"),
        ({"weights": [1, 1, -1, 1, 1]}, r"weights\[2\] = -1"),
        ({"weights": [1, 1, np.nan, 1, 1]}, r"weights\[2\] = nan"),
        ({"weights": [1, 1]}, r"shape \(5,\), got \(2,\)"),
        ({"weights": [0] * 5}, "all 5 weights are 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments_are_refused_with_the_numbers(arguments, message):
    with pytest.raises(DataError, match=message):
        DataLoader(columns(5), **({"global_batch_size": 2} | arguments))


def test_a_failing_transform_names_the_example_and_keeps_the_cause():
    def transform(example):
        return {"v": 1 / (example - 2.0)}

    loader = DataLoader([0.0, 1.0, 2.0], 3, transform=transform)
    with pytest.raises(DataError, match=r"transform failed on example 2 .*ZeroDivision") as caught:
        loader.batch(0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_source_that_breaks_its_promise_is_named():
    class Short(list):
        def __len__(self):
            return 5

    with pytest.raises(DataError, match=r"IndexError although len\(source\) is 5"):
        DataLoader(Short([1, 2]), 5).batch(0)


def test_shardings_that_do_not_fit_name_leaf_and_shape():
    loader = DataLoader(columns(), 6)
    m = mesh(4, 2)
    with pytest.raises(DataError, match=r"batch leaf x \[6, 2\] cannot be sharded"):
        loader.batch(0, NamedSharding(m, PartitionSpec("data")))
    with pytest.raises(DataError, match="one per leaf"):
        loader.batch(0, {"x": NamedSharding(m, PartitionSpec())})


def test_a_negative_step_is_refused():
    with pytest.raises(DataError, match="negative"):
        DataLoader(columns(), 6).batch(-1)


def test_repeats_within_a_batch_when_asked_for():
    assert DataLoader(columns(3), 6, allow_repeats=True).batch(0)["y"].shape == (6,)
