"""Real plans: a checkpoint of any layout restores on any other, bit for bit."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_plan_models import make_plan
from checkpoint_states import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as hst

import shardtrain as st
from shardtrain.launch import launch

WORKER = Path(__file__).with_name("checkpoint_plans_worker.py")

# strategy, number of devices: replicas, every ZeRO level, tensor, pipelines of 2 and 4 stages
LAYOUTS = [
    ("data=8", 8),
    ("data=2,fsdp=4,zero=1", 8),
    ("fsdp=4,tensor=2,zero=2", 8),
    ("data=2,fsdp=2,tensor=2", 8),
    ("data=2,pipeline=4,num_microbatches=2", 8),
    ("fsdp=2,pipeline=2,num_microbatches=2", 4),
    ("tensor=2", 2),
    ("data=1", 1),
]

# processes -> (directory restored from, strategy on the 4 devices of all, directory saved to)
BY_PROCESSES = {
    2: [
        ("4", "data=2,fsdp=2,zero=1", "2-a"),
        ("1", "data=2,pipeline=2,num_microbatches=2", "2-b"),
        ("2", "fsdp=4", "2-c"),
    ],
    4: [
        ("2-b", "tensor=4", "4-a"),
        ("2-a", "pipeline=4,num_microbatches=2", "4-b"),
        ("5", "fsdp=2,tensor=2,zero=2", "4-c"),
    ],
}
SAVED = [str(number) for number in range(len(LAYOUTS))]
SAVED += [target for tasks in BY_PROCESSES.values() for _, _, target in tasks]


def randomized(state):
    """Every float of the state, moments too, made distinct; on the shardings it has."""
    rng = np.random.default_rng(0)

    def noise(leaf):
        if not jax.numpy.issubdtype(leaf.dtype, np.floating):
            return leaf
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(noise, state)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, devices):
    """The same state, saved once from each layout: restored from one, saved by the next."""
    root = tmp_path_factory.mktemp("plans")
    plans = [make_plan(*layout) for layout in LAYOUTS]
    source = plans[-1]
    want = randomized(source.init(0))
    with st.Checkpointer(root / "first", source) as checkpointer:
        checkpointer.save(want)
    for number, plan in enumerate(plans):
        with st.Checkpointer(root / "first", plan) as checkpointer:
            state = checkpointer.restore()
        with st.Checkpointer(root / str(number), plan) as checkpointer:
            checkpointer.save(state)
    for processes, tasks in BY_PROCESSES.items():
        run_processes(root, processes, tasks)
    return root, plans, want


def run_processes(root, processes, tasks):
    """Restore and save on a mesh of several real processes (gloo)."""
    environ = os.environ | {
        "PYTHONPATH": str(WORKER.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    code = launch(
        [sys.executable, str(WORKER), str(root), *(":".join(task) for task in tasks)],
        num_processes=processes,
        devices_per_process=4 // processes,
        max_restarts=0,
        run_directory=root / f"launch-{processes}",
        environ=environ,
    )
    assert code == 0


@pytest.mark.processes
@settings(max_examples=60, deadline=None)
@given(hst.sampled_from(SAVED), hst.integers(0, len(LAYOUTS) - 1))
def test_any_layout_restores_any_other_bit_for_bit(runs, saved_by, restored_by):
    root, plans, want = runs
    plan = plans[restored_by]
    with st.Checkpointer(root / saved_by, plan) as checkpointer:
        state = checkpointer.restore()
    assert_same_bits(plan.to_checkpoint(state), want)
    for leaf, abstract in zip(
        jax.tree.leaves(state), jax.tree.leaves(plan.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)


@pytest.mark.processes
def test_the_file_is_the_same_whoever_saved_it(runs):
    headers = [st.inspect(runs[0] / name).header for name in SAVED]
    assert len({tuple(header.fingerprints.items()) for header in headers}) == 1
    assert len({str(header.leaves) for header in headers}) == 1
    assert {header.mesh["devices"] for header in headers} == {1, 2, 4, 8}
    assert {header.mesh["processes"] for header in headers} == {1, 2, 4}
