"""What the host does beside the device: when it reads metrics, and who reads and places batches."""

import threading

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st

NAMES = ("loss", "grad_norm", "weight", "skipped")


def columns():
    return {"x": np.ones((64, 4), "float32"), "y": np.zeros(64, "int32")}


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["x"]), batch["y"])


@pytest.fixture
def plan(devices):
    batch = st.DataLoader(columns(), 8).abstract_batch
    return st.plan(
        lambda rngs: nnx.Linear(4, 2, rngs=rngs), loss_fn, optax.sgd(0.1), batch, "data=8"
    )


class Metric:
    """A scalar on a device that writes down when it is read."""

    def __init__(self, events, name, step):
        self.events, self.name, self.step = events, name, step

    def __array__(self, dtype=None, copy=None):
        self.events.append((f"read {self.name}", self.step))
        return np.asarray(0.0 if self.name == "skipped" else 1.0, dtype)


def watched(plan, monkeypatch):
    """The events of a run: each dispatched step, each metric read."""
    events = []

    def step(state, batch):
        number = 1 + sum(name == "dispatch" for name, _ in events)
        events.append(("dispatch", number))
        return state, {name: Metric(events, name, number) for name in NAMES}

    monkeypatch.setattr(plan, "step", step)
    return events


def test_metrics_of_a_step_are_read_once_and_only_when_the_next_is_dispatched(plan, monkeypatch):
    events = watched(plan, monkeypatch)
    result = st.fit(plan, st.DataLoader(columns(), 8), 5, progress=False)
    assert len(result.history) == 5
    order = list(dict.fromkeys((name.split()[0], step) for name, step in events))
    assert order == [
        ("dispatch", 1), ("dispatch", 2), ("read", 1), ("dispatch", 3), ("read", 2),
        ("dispatch", 4), ("read", 3), ("dispatch", 5), ("read", 4), ("read", 5),
    ]  # fmt: skip
    reads = [event for event in events if event[0] != "dispatch"]
    assert sorted(reads) == sorted((f"read {name}", s) for name in NAMES for s in range(1, 6))


def test_nothing_but_the_metrics_is_fetched_between_steps(plan, monkeypatch):
    """A look at any array of the state would wait for the step that makes it."""
    dispatched, looks = [], []
    real = plan.step
    monkeypatch.setattr(plan, "step", lambda *given: (dispatched.append(1), real(*given))[1])
    kind = type(jax.device_put(1.0))

    def counting(name):
        method = getattr(kind, name)

        def look(self, *args, **kwargs):
            looks.append((len(dispatched), name))
            return method(self, *args, **kwargs)

        return look

    for name in ("__array__", "__float__", "__int__", "__bool__", "block_until_ready"):
        monkeypatch.setattr(kind, name, counting(name))
    st.fit(plan, st.DataLoader(columns(), 8), 12, progress=False)
    for step in range(3, 12):
        assert [name for n, name in looks if n == step] == ["__array__"] * len(NAMES)


def test_batches_are_read_and_placed_by_the_thread_that_reads_ahead(devices):
    where = []

    class Rows:
        def __len__(self):
            return 64

        def __getitem__(self, index):
            where.append(threading.current_thread().name)
            return {"x": np.full(4, index, "float32")}

    loader = st.DataLoader(Rows(), 8, shuffle=False)
    where.clear()  # example 0, read to learn its shape
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batches = [loader.batch(step, sharding) for step in range(4)]
    loader.close()
    assert {name.split("_")[0] for name in where} == {"shardtrain-data"}
    assert [batch["x"][0, 0] for batch in batches] == [0, 8, 16, 24]
    assert all(batch["x"].sharding == sharding for batch in batches)
