"""A test model, pipelined and on one device."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pipeline_models import abstract_batch, loss, make_batch, setup

from shardtrain.pipeline.executor import make_pipeline_grad
from shardtrain.pipeline.extract import extract
from shardtrain.pipeline.schedules import make_schedule
from shardtrain.pipeline.stages import (
    from_stage_major,
    stage_layout,
    stage_major_specs,
    to_stage_major,
)
from shardtrain.pytree import leaves_by_path
from shardtrain.train import over_microbatches, value_and_grad

AXES = ("data", "fsdp", "pipeline", "tensor")


def make_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def quickly(jitted, args):
    """Compiled with little optimisation: where compiling takes most of the time, running none."""
    options = {"xla_backend_optimization_level": 0}
    return jitted.lower(*args).compile(compiler_options=options)


@functools.lru_cache(maxsize=8)
def made(model, per):
    """Form, loss and values of a model; the same for every schedule."""
    return setup(model, per)


@functools.lru_cache(maxsize=8)
def split(model, per, chunks):
    form, make_loss, _, _ = made(model, per)
    return extract(make_loss, loss, form, abstract_batch(per), chunks)


@functools.lru_cache(maxsize=8)
def on_one_device(model, rows, microbatches):
    _, make_loss, params, variables = made(model, rows // microbatches)
    one = value_and_grad(make_loss(loss))
    step = over_microbatches(one, microbatches, lambda grads: grads)
    args = params, variables, make_batch(rows), jax.random.key(3)
    return quickly(jax.jit(step), args)(*args)


class Pipelined:
    """A model, its pipeline and its values, ready to run."""

    def __init__(self, model, schedule, sizes, microbatches=4, virtual=1, rows=16):
        self.mesh, self.rows = make_mesh(**sizes), rows
        stages = sizes["pipeline"]
        self.microbatches = microbatches
        per = rows // microbatches
        self.source = model
        self.form, self.make_loss, self.params, self.variables = made(model, per)
        self.model = split(model, per, stages * virtual)
        self.schedule = make_schedule(schedule, stages, microbatches, virtual)
        sizes = (self.model.count, stages, virtual)
        self.layout = stage_layout(self.params, self.model.params, *sizes)
        self.state_layout = stage_layout(self.variables, self.model.states, *sizes)

    def shardings(self):
        """Matrices sharded over `tensor`, blocks over `pipeline`."""
        two = lambda x, stacked: np.ndim(x) - stacked == 2 and x.shape[-1] % 2 == 0
        specs = {
            path: PartitionSpec(*[None] * (np.ndim(x) - 1), "tensor")
            if two(x, any(path in leaf.paths and leaf.stacked for leaf in self.model.params))
            else PartitionSpec(*[None] * np.ndim(x))
            for path, x in leaves_by_path(self.params).items()
        }
        tree = jax.tree.unflatten(jax.tree.structure(self.params), list(specs.values()))
        place = lambda spec: NamedSharding(self.mesh, spec)
        major = stage_major_specs(tree, self.layout)
        return jax.tree.map(place, major, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def lowered(self):
        shardings = self.shardings()
        constrain = lambda grads: jax.lax.with_sharding_constraint(grads, shardings)
        grad = make_pipeline_grad(
            self.model, self.schedule, self.mesh, self.layout, constrain=constrain
        )
        params = jax.device_put(to_stage_major(self.params, self.layout), shardings)
        variables = to_stage_major(self.variables, self.state_layout)
        rows = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        batch = jax.device_put(make_batch(self.rows), rows)
        return jax.jit(grad), (params, variables, batch, jax.random.key(3))

    def reference(self):
        return on_one_device(self.source, self.rows, self.microbatches)

    def assert_like_one_device(self, found):
        """Gradients, loss, metrics and variables within 1e-5."""
        expected = self.reference()
        assert_equal(from_stage_major(found.grads, self.layout), expected.grads, "gradient of")
        assert_equal(found.output, expected.output, "output")
        variables = from_stage_major(found.variables, self.state_layout)
        assert_equal(variables, expected.variables, "variable")


def numbers(tree):
    """Leaves by path; rng keys as their data."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return {
        path: np.asarray(jax.random.key_data(x) if is_key(x) else x)
        for path, x in leaves_by_path(tree).items()
    }


def assert_equal(found, expected, what):
    """Within 1e-5 of each leaf's largest entry."""
    found, expected = numbers(found), numbers(expected)
    assert found.keys() == expected.keys()
    for path, want in expected.items():
        scale = np.max(np.abs(want)) + 1e-2
        np.testing.assert_allclose(
            found[path] / scale, want / scale, atol=1e-5, err_msg=f"{what} {path}"
        )
