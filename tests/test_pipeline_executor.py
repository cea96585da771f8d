"""Pipelined losses, gradients and state equal the same microbatches on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from pipeline_models import LinenModel, NnxModel, loss, make_batch
from pipeline_runs import Pipelined, assert_equal, make_mesh

from shardtrain.errors import BatchError, ScheduleError, StageSplitError
from shardtrain.pipeline.executor import make_pipeline_grad
from shardtrain.pipeline.schedules import make_schedule
from shardtrain.pipeline.stages import (
    StageMajor,
    from_stage_major,
    stage_layout,
    stage_major_specs,
    to_stage_major,
)
from shardtrain.planner.collectives import collectives_of
from shardtrain.train import over_microbatches, per_replica, sum_replicas, value_and_grad

CUBE = {"data": 2, "pipeline": 2, "tensor": 2}
LONG = {"data": 2, "pipeline": 4}


@pytest.mark.parametrize(
    ("model", "schedule", "sizes", "options"),
    [
        (lambda: LinenModel("loop"), "1f1b", CUBE, {}),
        (lambda: LinenModel("scan"), "interleaved", CUBE, {"virtual": 2}),
        (lambda: lambda rngs: NnxModel(rngs, "plain"), "gpipe", LONG, {}),
        (lambda: lambda rngs: NnxModel(rngs, "norm"), "1f1b", LONG, {}),
        (lambda: lambda rngs: NnxModel(rngs, "aux list"), "interleaved", CUBE, {"virtual": 2}),
        (lambda: lambda rngs: NnxModel(rngs, "scan"), "1f1b", LONG, {"microbatches": 2}),
        (lambda: lambda rngs: NnxModel(rngs, "remat", 5), "1f1b", CUBE, {"rows": 8}),
        (lambda: lambda rngs: NnxModel(rngs, "aux"), "zero-bubble", CUBE, {"virtual": 2}),
    ],
    ids=[
        "linen",
        "linen scan",
        "nnx",
        "batch norm",
        "aux",
        "few microbatches",
        "remainder",
        "split",
    ],
)
def test_every_schedule_equals_one_device(model, schedule, sizes, options, devices):
    run = Pipelined(model(), schedule, sizes, **options)
    step, args = run.lowered()
    run.assert_like_one_device(step(*args))


def temp_bytes(schedule, sizes, microbatches, virtual=1, rows=64, mode="dry"):
    """The compiler's temporary bytes on one device, and the run."""
    model = lambda rngs: NnxModel(rngs, mode)
    run = Pipelined(model, schedule, sizes, microbatches, virtual, rows=rows * microbatches)
    step, args = run.lowered()
    return step.lower(*args).compile().memory_analysis().temp_size_in_bytes, run


@pytest.mark.parametrize(
    ("schedule", "sizes", "virtual", "counts", "rows"),
    [
        ("1f1b", {"data": 2, "pipeline": 4}, 1, (4, 7, 16), (4, 7, 7)),
        ("gpipe", {"pipeline": 4}, 1, (4, 7, 16), (4, 7, 16)),
        ("interleaved", {"pipeline": 2}, 2, (2, 4, 8), (4, 5, 5)),
    ],
    ids=["1f1b", "gpipe", "interleaved"],
)
def test_memory_is_the_stash_the_table_declares(schedule, sizes, virtual, counts, rows, devices):
    """Between numbers of microbatches, the rows of the stash and the tokens are all that differs.

    Tokens cost each microbatch the same, so two differences determine them and prove the rest.
    """
    found = [temp_bytes(schedule, sizes, count, virtual) for count in counts]
    assert tuple(run.schedule.table.stash_rows for _, run in found) == rows
    assert tuple(max(run.schedule.peak_activations) for _, run in found) == rows
    ((carried,), share) = found[0][1].model.carry, sizes.get("data", 1)
    assert carried.shape == (64, 6, 8)
    stash = np.array([64 * 6 * 8 * 4 // share * n for n in rows])  # float32 stage inputs
    rest = np.array([temp for temp, _ in found]) - stash
    tokens = np.diff(rest) / np.diff(counts)
    assert 0 < tokens[1] <= 3 * 64 * 6 * 4 // share  # tokens, targets and mask of a microbatch
    np.testing.assert_allclose(tokens[0], tokens[1], rtol=0.01)


def test_1f1b_needs_the_same_memory_for_any_number_of_microbatches(devices):
    temp = {}
    for schedule, count in [("1f1b", 8), ("1f1b", 64), ("gpipe", 8), ("gpipe", 64)]:
        run = Pipelined(
            lambda rngs: NnxModel(rngs, "aux"), schedule, {"pipeline": 2}, count, rows=2 * count
        )
        step, args = run.lowered()
        memory = step.lower(*args).compile().memory_analysis()
        tokens = sum(x.nbytes for x in jax.tree.leaves(args[2]))
        temp[schedule, count] = memory.temp_size_in_bytes - tokens
    assert temp["1f1b", 64] < 1.02 * temp["1f1b", 8]
    assert temp["gpipe", 64] > 2 * temp["gpipe", 8]


def test_gradients_can_be_reduced_once_per_step(devices):
    """Mapped over replicas, the loop only adds up: they meet after it."""
    model = lambda rngs: NnxModel(rngs, "dry")
    run = Pipelined(model, "1f1b", {"pipeline": 2}, rows=8)  # one replica's share of the batch
    whole = Pipelined(model, "1f1b", {"pipeline": 2}, rows=16)
    mesh = make_mesh(data=2, pipeline=2)
    grad = make_pipeline_grad(run.model, run.schedule, mesh, run.layout, batch_axes=("fsdp",))
    once = sum_replicas(per_replica(grad, 2, ("data",)), lambda grads: grads)
    params, variables = to_stage_major(run.params, run.layout), run.variables
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    variables = to_stage_major(variables, run.state_layout)
    batch = jax.device_put(make_batch(16), NamedSharding(mesh, PartitionSpec("data")))
    args = (params, variables, batch, jax.random.key(3))
    found = jax.jit(once)(*args)
    one = over_microbatches(value_and_grad(run.make_loss(loss)), 4, lambda grads: grads)
    expected = [
        jax.jit(one)(run.params, run.variables, half, jax.random.key(3))
        for half in (jax.tree.map(lambda x: x[:8], batch), jax.tree.map(lambda x: x[8:], batch))
    ]
    total = jax.tree.map(jnp.add, expected[0].grads, expected[1].grads)
    assert_equal(from_stage_major(found.grads, run.layout), total, "gradient of")
    plain = make_pipeline_grad(whole.model, whole.schedule, mesh, whole.layout)
    reductions = {}
    for name, program in (("once", once), ("per tick", plain)):
        compiled = jax.jit(program).lower(*args).compile()
        found = [c for c in collectives_of(compiled, mesh) if c.axes == ("data",)]
        reductions[name] = sum(c.count * c.bytes for c in found)
    assert reductions["per tick"] > 3 * reductions["once"] > 0


def test_sizes_that_do_not_fit_are_refused(devices):
    run = Pipelined(lambda rngs: NnxModel(rngs, "aux"), "1f1b", CUBE)
    other = make_schedule("1f1b", 4, 4)
    with pytest.raises(ScheduleError, match="has 4 stages, but the mesh axis pipeline has size 2"):
        make_pipeline_grad(run.model, other, run.mesh, run.layout)
    other = make_schedule("interleaved", 2, 4, 2)
    with pytest.raises(ScheduleError, match=r"for 2 x 2 .*laid out for 2 x 1"):
        make_pipeline_grad(run.model, other, run.mesh, run.layout)
    step, (params, variables, _, key) = run.lowered()
    with pytest.raises(BatchError, match=r"\[18\] rows cannot be split into 4 microbatches"):
        step(params, variables, make_batch(18), key)
    with pytest.raises(StageSplitError, match="4 layers are not divisible by 3 stages x 1"):
        stage_layout(run.params, run.model.params, 4, 3, 1)


def test_layers_of_one_leaf_must_share_a_sharding(devices):
    run = Pipelined(lambda rngs: NnxModel(rngs, "aux"), "1f1b", CUBE)
    specs = jax.tree.map(lambda x: PartitionSpec(), run.params)
    specs["blocks"][0]["linear"]["kernel"] = PartitionSpec("tensor")
    with pytest.raises(StageSplitError, match=r"blocks/\*/linear/kernel have different shardings"):
        stage_major_specs(specs, run.layout)
    assert isinstance(to_stage_major(run.params, run.layout), StageMajor)
    assert jnp.shape(run.params["scale"]) == (6,)
