import pytest

from shardtrain.errors import HardwareError
from shardtrain.hardware import CHIPS, chip, hardware


def test_published_peaks_and_memory():
    assert chip("h100").peak_flops("bf16") == 989.4e12
    assert chip("h100").peak_flops("fp8") == 1978.9e12
    assert chip("a100").memory_bandwidth == 2039e9
    assert chip("v5p").peak_flops("int8") == 918e12
    assert chip("TPUv6e").peak_flops() == 918e12
    assert chip("gb300").peak_flops("fp4") == 15000e12


def test_achievable_matmul_is_the_measured_one():
    assert chip("a100").matmul_flops() == pytest.approx(271.2e12, rel=1e-3)
    assert chip("h100").matmul_flops() == pytest.approx(794.5e12, rel=1e-3)
    assert chip("h100").matmul_flops("fp8") == pytest.approx(1402.6e12, rel=1e-3)
    assert chip("b200").matmul_flops() == pytest.approx(1745e12, rel=1e-3)
    assert chip("gb200").matmul_flops("fp8") == pytest.approx(3615.6e12, rel=1e-3)


def test_dtype_the_chip_lacks_runs_wider():
    assert chip("a100").peak_flops("fp8") == 312e12
    assert chip("h100").peak_flops("fp4") == 1978.9e12
    with pytest.raises(HardwareError, match="did you mean 'bf16'"):
        chip("a100").peak_flops("bf17")


@pytest.mark.parametrize(
    ("spec", "chips", "devices", "hosts"),
    [
        ("h100:8x8", 64, 64, 8),
        ("v5p:4x4x4", 64, 64, 16),
        ("tpu7x:4x4x4", 64, 128, 16),
        ("cpu:8", 8, 8, 1),
        ("h100:16", 16, 16, 2),
        ("gb200:18x4", 72, 72, 18),
        ("a100", 8, 8, 1),
    ],
)
def test_counts(spec, chips, devices, hosts):
    found = hardware(spec)
    assert (found.chip_count, found.device_count, found.host_count) == (chips, devices, hosts)


def test_fast_domain():
    assert hardware("h100:8x8").domain_size == 8
    assert hardware("gb200:18x4").domain_size == 72
    assert hardware("v5e:16x16").domain_size == 256


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h10:8", "did you mean 'h100'"),
        ("h100:8x", "'h100:8x8'"),
        ("v5e:4x4x4", "2D torus"),
        ("h100:2x2x2", "hosts x chips"),
        ("h100:12", "does not fill hosts of 8"),
    ],
)
def test_errors_name_the_remedy(spec, words):
    with pytest.raises(HardwareError, match=words):
        hardware(spec)


def test_every_chip_names_its_source():
    for found in CHIPS.values():
        assert len(found.source) > 20
        assert 0 < found.matmul <= 1
        assert found.memory_bandwidth > found.network_bandwidth


def test_str_and_tables():
    found = hardware("h100:8x8")
    assert str(found) == "h100:8x8"
    assert hardware(str(found)) == found
    assert "794 TFLOP/s" in found._repr_html_()
    assert found.__rich__().row_count == len(found.rows())
