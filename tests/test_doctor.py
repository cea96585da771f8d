"""shardtrain doctor: rates of this machine, problems by name, and the planner that uses them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import shardtrain as st
from shardtrain.cli import main
from shardtrain.doctor import examine
from shardtrain.doctor.examine import as_hardware
from shardtrain.doctor.measure import Link, Sizes, link_rates, seconds
from shardtrain.doctor.problems import problems
from shardtrain.errors import HardwareError, MeshError
from shardtrain.hardware import chip_of_device, local_file, measured_locally
from shardtrain.plan.report import local_hardware

TINY = Sizes(64, 2**16, 2**20)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return examine({"data": 2, "tensor": 4}, tmp_path_factory.mktemp("disk"), sizes=TINY)


def test_everything_is_measured(found):
    assert set(found.matmul) == {"fp32", "bf16"}
    rates = [*found.matmul.values(), found.memory_bandwidth, found.host_to_device,
             found.device_to_host, found.disk_write, found.disk_read]  # fmt: skip
    assert all(rate > 0 for rate in rates)
    assert [(link.axis, link.size) for link in found.links] == [("data", 2), ("tensor", 4)]
    assert found.versions["jax"] == jax.__version__
    text = str(found.table())
    for row in ("matmul bf16", "all-reduce over tensor (4)", "host to device", "disk write"):
        assert row in text


def test_local_hardware_is_what_was_measured(found):
    with pytest.raises(HardwareError, match="run `shardtrain doctor` first"):
        st.hardware("local")
    assert found.save() == local_file()
    local = st.hardware("local")
    assert local.device_count == 8
    assert local.chip.peak_flops("fp32") == found.matmul["fp32"]
    assert local.chip.memory_bandwidth == found.memory_bandwidth
    assert str(st.hardware("local:4")) == "local:1x4"
    assert json.loads(local_file().read_text())["versions"]["jax"] == jax.__version__


def test_planner_and_estimates_use_it(found):
    devices = jax.devices()
    kind = devices[0].device_kind
    assert not measured_locally(kind, 8)
    found.save()
    assert measured_locally(kind, 8)
    assert not measured_locally(kind, 4)
    mesh = jax.make_mesh((8,), ("data",))
    assert local_hardware(mesh) == "local:1x8"
    best = st.explore("gpt2-124m", hardware="local", global_batch=64, sequence=1024).best
    assert best.hardware.chip.name == "local"


def test_unreadable_file_says_what_to_do(found):
    found.save().write_text("{}")
    assert not measured_locally("cpu", 8)
    with pytest.raises(HardwareError, match="run `shardtrain doctor`"):
        st.hardware("local")
    found.save()
    with pytest.raises(HardwareError, match="hosts x devices"):
        st.hardware("local:2x2x2")


def test_listed_chips_keep_what_was_not_measured():
    @dataclasses.dataclass(frozen=True)
    class Device:
        device_kind: str = "NVIDIA H100 80GB HBM3"
        platform: str = "gpu"
        process_index: int = 0

    links = [Link("all", 4, 3.6e11, 5e-5)]
    local = as_hardware([Device()] * 4, {"fp32": 5e13, "bf16": 7e14}, 3e12, links, 5e10)
    assert local.chip.memory == 80e9
    assert local.chip.matmul_flops() == pytest.approx(7e14)
    assert local.chip.link_bandwidth == 3.6e11
    assert local.chip.source.startswith("measured on 4 x NVIDIA H100")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GH200 480GB", "gh200"), ("TPU v5 lite", "v5e"),
     ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA B200", "b200"), ("TPU7x", "tpu7x")],
)  # fmt: skip
def test_chips_by_their_device_kind(kind, name):
    assert chip_of_device(kind).name == name


def test_unknown_device_is_no_chip():
    assert chip_of_device("cpu") is None
    assert chip_of_device("Acme 9000") is None


def test_all_reduce_sends_what_the_ring_says():
    (link,) = link_rates(jax.devices()[:2], {"data": 2, "tensor": 1}, 2**16)
    assert (link.axis, link.size) == ("data", 2)
    assert link.bandwidth > 0
    assert link.latency > 0


def test_seconds_waits_and_takes_the_median():
    assert seconds(lambda: jnp.ones(8) + 1) > 0


def test_wrong_mesh_is_refused(tmp_path):
    with pytest.raises(MeshError, match="data=3 needs 3 devices, there are 8"):
        examine({"data": 3}, tmp_path, sizes=TINY)


def test_problems_are_named_with_remedies(tmp_path):
    good = {"jax": "0.10.2", "jaxlib": "0.10.2"}
    cpu = jax.devices()
    quiet = {"environment": {}, "has_gpu_driver": False}
    assert problems(good, cpu, tmp_path, **quiet) == []
    told = problems(
        {"jax": "0.9.1", "jaxlib": "0.10.2"}, cpu, tmp_path,
        {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1",
         "CUDA_LAUNCH_BLOCKING": "1",
         "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, has_gpu_driver=True,
    )  # fmt: skip
    for words in ("older than 0.10", "do not belong together", "JAX_PLATFORMS=cpu hides it",
                  "st.simulate(8)", "every kernel wait", "64-bit", "debugging only"):  # fmt: skip
        assert sum(words in one for one in told) == 1, words


def test_cli(tmp_path, capsys):
    code = main(["doctor", "--mesh", "data=8", "--directory", str(tmp_path)])
    out = capsys.readouterr().out
    assert code in (0, 1)  # 1: this machine has a problem, which is then printed
    assert "problem" in out
    assert "all-reduce over data (8)" in out
    assert "kept for --hardware local" in out
    assert local_file().is_file()
    local_file().unlink()
    main(["doctor", "--dry", "--directory", str(tmp_path)])
    assert not local_file().exists()
