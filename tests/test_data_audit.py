"""The first-batch audit, with two processes played by two device halves."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardtrain.data import audit_first_batch
from shardtrain.errors import DataError


class Half:
    """A global array as one of two processes sees it."""

    def __init__(self, array, process):
        self.addressable_shards = [
            s for s in array.addressable_shards if s.device.id // 4 == process
        ]


def views(spec, values, mesh_shape=(2, 4)):
    """The batch of each process; `values[p]` is what process p delivered for its devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(mesh_shape), ("data", "tensor"))
    sharding = NamedSharding(mesh, spec)
    return [
        {n: Half(jax.device_put(leaf, sharding), process) for n, leaf in values[process].items()}
        for process in (0, 1)
    ]


def audit(batches):
    """Run both processes: record what each sends, then answer both with everything."""
    sent = [[], []]

    def recorder(process):
        def exchange(array):
            sent[process].append(array)
            return np.stack([array, array])

        return exchange

    for process in (0, 1):
        try:
            audit_first_batch(batches[process], process, 2, recorder(process))
        except DataError:
            continue  # what a process compares with itself is not the subject here
    for process in (0, 1):
        answers = iter(zip(*sent, strict=True))
        audit_first_batch(batches[process], process, 2, lambda _, a=answers: np.stack(next(a)))


GOOD = {"x": np.arange(16.0).reshape(8, 2), "mask": np.ones((8, 2))}


def test_own_rows_pass():
    audit(views(PartitionSpec("data"), [GOOD, GOOD]))


def test_replicated_rows_pass_when_equal():
    audit(views(PartitionSpec(None, "tensor"), [GOOD, GOOD], mesh_shape=(4, 2)))


def test_the_same_data_from_both_processes_is_caught():
    doubled = {"x": np.tile(GOOD["x"][:4], (2, 1)), "mask": np.ones((8, 2))}
    with pytest.raises(DataError, match=r"processes 0 and 1 own different rows.*identical data"):
        audit(views(PartitionSpec("data"), [doubled, doubled]))


def test_replicas_with_different_data_are_caught():
    other = {"x": GOOD["x"] + 1, "mask": np.ones((8, 2))}
    with pytest.raises(DataError, match="hold the same rows of batch leaf x but"):
        audit(views(PartitionSpec(None), [GOOD, other]))


def test_constant_batches_are_not_mistaken_for_duplicates():
    zeros = {"x": np.zeros((8, 2)), "mask": np.ones((8, 2))}
    audit(views(PartitionSpec("data"), [zeros, zeros]))


def test_one_process_needs_no_exchange():
    audit_first_batch({"x": jax.numpy.zeros((4, 2))}, 0, 1, exchange=NotImplemented)
