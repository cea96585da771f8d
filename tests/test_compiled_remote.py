"""Compiling in a child process, for devices this process does not have."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.errors import HardwareError, OutOfMemoryError
from shardtrain.planner import remote
from shardtrain.planner.assertions import assert_collectives
from shardtrain.planner.remote import compile_elsewhere, export_step, leaf_names

AXES = {"data": 8, "tensor": 2}
MESH = AbstractMesh((8, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def abstract(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*spec)))


PARAMS = {"down": abstract((64, 32), "tensor"), "up": abstract((32, 64), None, "tensor")}
ARGS = (PARAMS, abstract((16, 32), "data"))


@functools.partial(
    jax.jit, donate_argnums=0, out_shardings=jax.tree.map(lambda p: p.sharding, PARAMS)
)
def step(params, x):
    loss = lambda params: jnp.sum(jnp.tanh(x @ params["up"]) @ params["down"])
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


@pytest.mark.processes
def test_sixteen_devices_from_a_process_with_eight():
    found = compile_elsewhere(step, ARGS, AXES, "cpu:16")
    gradients = 4 * (64 * 32 + 32 * 64) // 2
    # The loss is a sum, so dx is not needed: no reduction over `tensor` but the gradients' own.
    assert_collectives(found, {("all-reduce", "data"): (None, gradients)})
    kernels = gradients
    assert found.alias_bytes == kernels
    assert found.argument_bytes == kernels + 4 * 16 // 8 * 32
    assert found.arguments == (
        ("params['down']", kernels // 2),
        ("params['up']", kernels // 2),
        ("x", 256),
    )
    # One product forward (the loss is linear in the second), three backward.
    assert found.flops == 4 * 2 * 16 * 32 * 64 // 16
    assert found.note == "compiled for 16 CPU devices"
    assert {c.source.partition(":")[0] for c in found.collectives} == {__file__}


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(
        HardwareError, match="cpu:1x16 has 16 devices, the mesh is data=8, tensor=3"
    ):
        compile_elsewhere(step, ARGS, {"data": 8, "tensor": 3}, "cpu:16")


def test_a_child_that_fails_is_quoted(monkeypatch):
    monkeypatch.setattr(remote.subprocess, "run", lambda *a, **k: Done("first\nAborted: no luck"))
    with pytest.raises(
        HardwareError, match=r"child process \(status 1\):\nfirst\nAborted: no luck"
    ):
        compile_elsewhere(step, ARGS, AXES, "cpu:16")


def test_arguments_are_named_as_jax_names_them():
    assert leaf_names(step, ARGS) == ("params['down']", "params['up']", "x")


def test_an_argument_without_a_sharding_is_refused():
    args = (PARAMS, jax.ShapeDtypeStruct((16, 32), jnp.float32))
    with pytest.raises(ValueError, match="argument x has no sharding"):
        compile_elsewhere(step, args, AXES, "cpu:16")


def test_export_keeps_the_devices_of_the_abstract_mesh():
    exported = export_step(step, ARGS, "tpu")
    assert (exported.nr_devices, exported.platforms) == (16, ("tpu",))


class Done:
    def __init__(self, stderr):
        self.returncode, self.stderr = 1, stderr


def test_a_child_out_of_memory_is_out_of_memory_here(monkeypatch):
    stderr = "Traceback\nshardtrain.errors.OutOfMemoryError: the step does not fit one TPU v5 lite"
    monkeypatch.setattr(remote.subprocess, "run", lambda *a, **k: Done(stderr))
    with pytest.raises(OutOfMemoryError, match=r"^the step does not fit one TPU v5 lite"):
        compile_elsewhere(step, ARGS, AXES, "v5e:4x4")


def test_a_child_that_takes_too_long_is_named(monkeypatch):
    def run(*args, **options):
        raise remote.subprocess.TimeoutExpired("python", options["timeout"])

    monkeypatch.setattr(remote.subprocess, "run", run)
    with pytest.raises(HardwareError, match="v5e:4x4 took longer than 3 s"):
        compile_elsewhere(step, ARGS, AXES, "v5e:4x4", timeout=3)


def test_the_platform_follows_what_is_installed():
    installed = importlib.util.find_spec("libtpu") is not None
    platform, reason = remote.compiler_for(remote.hardware("v5e:4x4"))
    assert platform == ("tpu" if installed else "cpu")
    assert bool(reason) != installed
