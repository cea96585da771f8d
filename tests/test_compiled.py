"""Memory, operations and communication of a compiled step, and devices that are not here."""

import importlib.util
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from shardtrain.errors import HardwareError, OutOfMemoryError
from shardtrain.hardware import chip
from shardtrain.planner import targets
from shardtrain.planner.assertions import assert_collectives
from shardtrain.planner.collectives import Collective
from shardtrain.planner.compiled import Compiled, compile_lowered, out_of_memory, read_compiled
from shardtrain.planner.gpu_targets import TARGETS, target_config
from shardtrain.planner.lints import lint_collectives
from shardtrain.planner.targets import compiler_environment, target_devices

LAYERS, WIDTH, BATCH = 5, 32, 64


def make_step(devices, donate=True):
    """A scanned MLP's gradient step on `data=4 x tensor=2`: lowered program and mesh."""
    mesh = Mesh(
        np.array(devices).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    params = {
        "up": abstract((LAYERS, WIDTH, 2 * WIDTH), None, None, "tensor"),
        "down": abstract((LAYERS, 2 * WIDTH, WIDTH), None, "tensor"),
    }

    def loss(params, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

    jitted = jax.jit(
        step,
        donate_argnums=(0,) if donate else (),
        out_shardings=jax.tree.map(lambda p: p.sharding, params),
    )
    return jitted.lower(params, abstract((BATCH, WIDTH), "data")), mesh


@pytest.fixture(scope="module")
def compiled(devices):
    lowered, mesh = make_step(devices)
    return compile_lowered(lowered, mesh, note="as a test")


def test_flops_multiply_out_the_loop(compiled):
    # Two products forward, four backward, per layer; cost_analysis would count one layer.
    assert compiled.flops == 6 * LAYERS * 2 * BATCH * WIDTH * 2 * WIDTH // 8
    assert compiled.is_exact
    assert compiled.uncounted == ()


def test_memory_of_arguments_and_results_is_exact(compiled):
    kernels = 4 * LAYERS * 2 * WIDTH * 2 * WIDTH // 2  # float32, two of them, tensor=2
    batch = 4 * BATCH // 4 * WIDTH
    assert compiled.argument_bytes == kernels + batch
    assert compiled.alias_bytes == kernels  # donated
    assert compiled.total_bytes == compiled.argument_bytes + compiled.temp_bytes + (
        compiled.output_bytes - compiled.alias_bytes
    )
    assert kernels <= compiled.output_bytes < kernels + 64  # and a few words of table
    assert compiled.arguments == (
        ("params['down']", kernels // 2),
        ("params['up']", kernels // 2),
        ("x", batch),
    )


def test_without_donation_nothing_is_in_place(devices):
    lowered, mesh = make_step(devices, donate=False)
    assert read_compiled(lowered.compile(), mesh).alias_bytes == 0


def test_collectives_are_those_of_the_step(compiled):
    activation = 4 * BATCH // 4 * WIDTH
    gradients = 4 * 2 * WIDTH * 2 * WIDTH // 2
    assert_collectives(
        compiled,
        {
            ("all-reduce", "tensor"): (None, 2 * LAYERS * activation),
            ("all-reduce", "data"): (None, LAYERS * gradients),
        },
        ignore_below=5,
    )
    assert compiled.platform == "cpu"
    assert compiled.seconds > 0
    assert "ENTRY" in compiled.hlo
    assert "hlo" not in repr(compiled)


def test_figures_a_backend_does_not_give_are_none_not_zero():
    class Silent:
        input_shardings = output_shardings = ()

        def as_text(self):
            return "HloModule m\nENTRY %e (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}"

        def memory_analysis(self):
            return None

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    found = read_compiled(Silent(), mesh)
    assert (found.argument_bytes, found.temp_bytes, found.peak_bytes) == (None, None, None)
    assert found.total_bytes is None
    assert ("temporaries", "not given by this backend") in found.rows()


def test_prints_and_renders(compiled):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(compiled)
    text = console.export_text()
    for word in ("all-reduce", "tensor", "params['down']", "as a test", "GFLOP"):
        assert word in text
    assert "<table>" in compiled._repr_html_()
    assert "as a test" in compiled._repr_html_()


def test_html_escapes_what_comes_from_programs():
    row = Collective("all-reduce", 4, ("data",), source="<lambda>")
    html = Compiled(1, 1, 1, 1, 1, 1, (row,), "", 0.0, "cpu", note="a < b")._repr_html_()
    assert "&lt;lambda&gt;" in html
    assert "a &lt; b" in html


def test_out_of_memory_says_how_much_is_missing():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.75G) exceeds available HBM (15.75G)."
    )
    error = out_of_memory(message, "TPU v5 lite")
    assert isinstance(error, OutOfMemoryError)
    assert "does not fit one TPU v5 lite: needs 20.1 GB, has 16.9 GB" in str(error)
    assert "Ran out of memory" in str(out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory", "x"))


def test_the_compiler_running_out_of_memory_is_a_typed_error(devices):
    class Lowered:
        def compile(self, compiler_options=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 37.8G of 31.25G hbm.")

    with pytest.raises(OutOfMemoryError, match=r"needs 40\.6 GB, has 33\.6 GB"):
        compile_lowered(Lowered(), Mesh(np.array(devices[:1]), ("data",)))


# Devices that are not here.


@pytest.mark.parametrize(
    ("spec", "words"),
    [("v5e:2x2", "libtpu is not installed"), ("h100:1x4", "CUDA plugin is not installed")],
)
def test_a_missing_compiler_degrades_to_cpu_with_a_sentence(monkeypatch, devices, spec, words):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    target = target_devices(spec)
    assert target.is_proxy
    assert target.platform == "cpu"
    assert target.devices == tuple(devices[:4])
    assert words in target.note
    assert f"compiled for CPU, not {spec}" in target.note


def test_a_proxy_for_more_devices_than_here_has_none(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert target_devices("h100:8x8").devices == ()


def test_cpu_is_no_proxy_for_cpu(devices):
    target = target_devices("cpu:4")
    assert not target.is_proxy
    assert target.devices == tuple(devices[:4])
    assert target_devices("cpu:64").devices == ()


def test_tpu_is_real_exactly_when_libtpu_is_installed():
    installed = importlib.util.find_spec("libtpu") is not None
    target = target_devices("v5e:2x4")
    assert target.is_proxy != installed
    assert len(target.devices) == 8
    lowered, mesh = make_step(target.devices)
    found = compile_lowered(lowered, mesh, target.note)
    assert found.platform == ("tpu" if installed else "cpu")
    assert found.flops == 6 * LAYERS * 2 * BATCH * WIDTH * 2 * WIDTH // 8


def test_the_environment_of_the_compilers_is_put_back(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    with compiler_environment():
        assert targets.os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
        assert targets.os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" not in targets.os.environ
    assert targets.os.environ["TPU_WORKER_HOSTNAMES"] == "mine"


def test_compiler_descriptions_of_gpus():
    assert {chip(name).kind for name in TARGETS} == {"gpu"}
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in target_config("h200")
    assert "device_memory_size: 85100068864" in target_config("a100")
    with pytest.raises(HardwareError, match="did you mean 'h100'"):
        target_config("h1000")


# Lints.


def row(**fields):
    base = {"kind": "all-gather", "bytes": 2**20, "axes": ("fsdp",), "group_size": 4}
    return Collective(**{**base, **fields})


@pytest.mark.parametrize(
    ("collective", "options", "kind", "size"),
    [
        (
            row(kind="all-reduce", is_only_sliced=True, count=3),
            {},
            "all-reduce-then-slice",
            3 * 786432,
        ),
        (row(is_loop_invariant=True, count=4), {}, "repeated-gather", 3 * 2**20),
        (row(axes=("tensor",)), {"expected_axes": ["fsdp"]}, "unexpected-axis", 2**20),
        (row(axes=("fsdp", "tensor")), {"expected_axes": ["fsdp"]}, "unexpected-axis", 2**20),
        (row(axes=("?",), count=2), {"expected_axes": ["fsdp"]}, "unknown-groups", 2**21),
        (row(parameter="b"), {"expected_gathers": ["a*"]}, "unexpected-gather", 2**20),
        (row(parameter="a1 + b"), {"expected_gathers": ["a*"]}, "unexpected-gather", 2**20),
        (row(), {"expected_gathers": ["a*"]}, "unexpected-gather", 2**20),
    ],
)
def test_lints(collective, options, kind, size):
    (lint,) = lint_collectives([collective], **options)
    assert (lint.kind, lint.bytes) == (kind, size)


@pytest.mark.parametrize(
    ("collective", "options"),
    [
        (row(), {}),
        (row(is_loop_invariant=True, count=1), {}),
        (row(), {"expected_axes": ["fsdp", "tensor"]}),
        (row(parameter="a1 + a2"), {"expected_gathers": ["a*"]}),
        (row(bytes=100), {"expected_gathers": []}),
        (row(kind="all-reduce"), {"expected_gathers": []}),
    ],
)
def test_no_lint_where_nothing_is_wrong(collective, options):
    assert lint_collectives([collective], **options) == []


def test_cpu_shows_all_reduce_where_reduce_scatter_belongs(devices):
    mesh = Mesh(np.array(devices), ("fsdp",))
    sharding = NamedSharding(mesh, P("fsdp"))
    w = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding)
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=sharding)
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w))), out_shardings=sharding)
    found = compile_lowered(gradient.lower(w, x), mesh)
    assert [lint.kind for lint in found.lints(["fsdp"], ["w"])] == ["all-reduce-then-slice"]
    assert [lint.kind for lint in found.lints(["fsdp"], [])] == ["all-reduce-then-slice"]  # small
