"""Published runs: how records are read, and what the prediction may and may not use."""

import copy
import json
import math

import numpy as np
import pytest

from shardtrain.errors import HardwareError
from shardtrain.planner.calibration import (
    Features,
    Widths,
    calibration,
    covariance,
    measured_bytes,
    measured_seconds,
    memory_calibration,
)
from shardtrain.planner.points import load_points, read_point
from shardtrain.planner.points_models import read_model
from shardtrain.planner.points_predict import predict, predict_point

RECORD = {
    "id": "llama3-70b-h100",
    "framework": "Megatron-Bridge 26.04",
    "model": {"name": "llama3-70b", "layers": 80, "d_model": 8192, "n_heads": 64, "n_kv_heads": 8,
              "head_dim": 128, "d_ff": 28672, "mlp_matrices": 3, "vocab": 128256, "seq_len": 8192},
    "hardware": {"chip": "H100", "count": 64, "interconnect": "NVLink + IB"},
    "parallel": {"tp": 4, "pp": 8, "cp": 1, "vp": 5, "microbatch": 1, "global_batch": 256,
                 "precision": "fp8"},
    "source": "https://github.com/NVIDIA-NeMo/Megatron-Bridge docs",
}  # fmt: skip


def changed(path: str, value: object) -> dict:
    record = copy.deepcopy(RECORD)
    place = record
    *folders, name = path.split(".")
    for folder in folders:
        place = place[folder]
    if value is None:
        place.pop(name, None)
    else:
        place[name] = value
    return record


def test_terms_sum_to_the_step():
    found = predict_point(RECORD)
    assert sum(found.terms.values()) == pytest.approx(found.step_time, rel=1e-12)
    tokens = 256 * 8192 / 64
    assert found.tokens_per_second_per_device == pytest.approx(tokens / found.step_time)
    assert 20e9 < found.memory_bytes < 84.1e9  # it did run
    assert 0.2 < found.mfu < 0.9  # of the bf16 peak, in fp8
    assert found.evidence[0][0].startswith("mbridge")


def test_layout_is_read():
    job = read_point(RECORD).job
    assert (job.tensor, job.pipeline, job.virtual_stages, job.replicas) == (4, 8, 5, 2)
    assert (job.microbatch, job.num_microbatches) == (1, 128)
    assert job.precision == "fp8"
    assert job.step_tokens == 256 * 8192


def test_measured_values_and_notes_are_never_read():
    base = predict_point(RECORD)
    leaking = {
        **RECORD,
        "measured": {"tokens_per_s_per_device": 1.0, "step_time_s": 9e9, "memory_gib": 1.0},
        "derived": {"tokens_per_s_per_device": 1.0},
        "note": "raw: DGX-H100|64|FP8|256|1|8192|0|4|8|1|5|n/a|1|1",
        "published_flops_convention": "none",
    }
    found = predict_point(leaking)
    assert (found.step_time, found.memory_bytes) == (base.step_time, base.memory_bytes)


@pytest.mark.parametrize(
    "path",
    ["framework", "source", "id", "model.d_ff", "model.seq_len", "model.vocab", "hardware.count",
     "hardware.interconnect", "parallel.tp", "parallel.global_batch", "parallel.microbatch",
     "parallel.precision", "parallel"],
)  # fmt: skip
def test_missing_fields_get_defaults(path):
    found = predict_point(changed(path, None))
    assert math.isfinite(found.step_time)
    assert found.step_time > 0


def test_almost_nothing_is_enough():
    found = predict_point({"hardware": {"chip": "TPUv5p"}, "model": {"name": "some-13b"}})
    assert found.step_time > 0
    assert found.error > 0.1


def test_unknown_software_is_less_certain():
    known = predict_point(RECORD)
    unknown = predict_point(changed("framework", "MyTrainer 1.0"))
    assert unknown.error > 2 * known.error
    assert unknown.step_time == pytest.approx(known.step_time, rel=0.5)


@pytest.mark.parametrize(
    ("written", "name"),
    [("NVIDIA H200 SXM", "h200"), ("GB200 NVL72", "gb200"), ("A100-SXM4-80GB", "a100"),
     ("TPUv5e", "v5e"), ("TPU7x", "tpu7x"), ("AMD MI300X", "mi300x"), ("H20", "h20")],
)  # fmt: skip
def test_chip_names_as_sources_write_them(written, name):
    assert read_point(changed("hardware.chip", written)).job.chip.name == name


def test_unknown_chip_names_the_nearest():
    with pytest.raises(HardwareError, match="did you mean 'h100'"):
        predict_point(changed("hardware.chip", "H10"))
    with pytest.raises(HardwareError, match=r"names neither hardware\.chip"):
        predict_point(changed("hardware", {}))


@pytest.mark.parametrize(
    ("name", "params", "active"),
    [
        ("Qwen3_235B_a22B", 235.1, 22.2),
        ("DeepSeekV3 (tokendrop)", 671.0, 37.6),
        ("Kimi_K2", 1026.4, 32.9),
        ("Nemotron_3_Nano", 31.6, 3.6),
        ("GPT OSS 120B", 116.8, 5.8),
        ("Mixtral-8x22B-MaxText", 140.6, 39.2),
        ("Llama4-Scout-17B-16E-Maxtext", 107.8, 17.2),
    ],
)
def test_models_known_by_name(name, params, active):
    model = read_model({"model": {"name": name, "moe": {"kind": "moe"}}})
    assert model.params / 1e9 == pytest.approx(params, rel=2e-3)
    assert model.active_params / 1e9 == pytest.approx(active, rel=2e-2)


@pytest.mark.parametrize(("name", "billions"), [("acme-13b", 13), ("tiny 345M", 0.345)])
def test_unknown_models_have_about_the_named_size(name, billions):
    assert read_model({"model": {"name": name}}).params / 1e9 == pytest.approx(billions, rel=0.35)


@pytest.mark.parametrize(
    ("words", "gbytes"),
    [
        ("A100: 1600Gb/s RoCE", 25.0),
        ("4x OmniPath 100Gb/s (Jean Zay)", 6.25),
        ("NVLink in host, 400Gb/s RDMA per GPU", 50.0),
        ("8x400Gb/s per node", 50.0),
        ("400Gb/s per node", 6.25),
    ],
)
def test_interconnect_words(words, gbytes):
    found = read_point(changed("hardware.interconnect", words)).job.chip
    assert found.network_bandwidth == gbytes * 1e9


def test_calibration_follows_its_points():
    """On the runs it was fitted to, the median error is far below that on unseen runs."""
    records = load_points()
    errors = []
    for record in records[::8]:
        point = read_point(record)
        errors.append(abs(predict(point).step_time / measured_seconds(record, point) - 1))
    assert np.median(errors) < 0.03
    assert len(records) > 400


def test_memory_calibration_follows_its_points():
    pairs = [(r, measured_bytes(r)) for r in load_points()]
    errors = [abs(predict_point(r).memory_bytes / size - 1) for r, size in pairs if size]
    assert len(errors) > 30
    assert np.median(errors) < 0.05


def test_every_stored_record_names_its_source():
    records = load_points()
    assert all(r["source"] and r["tokens_per_s_per_device"] > 0 for r in records)
    assert len({r["id"] for r in records}) == len(records)
    assert "note" not in json.dumps([list(r) for r in records])


def test_unseen_stack_gets_only_the_common_constants():
    """A point that shares nothing has a similarity of zero and the shrunken overall constant."""
    record = {"framework": "Nobody", "model": {"name": "acme-3b", "seq_len": 128},
              "hardware": {"chip": "V100", "count": 4}, "parallel": {}}  # fmt: skip
    fix = calibration().correct(read_point(record))
    assert abs(fix.similarity) < 0.1
    assert abs(fix.constant) < 0.25
    assert memory_calibration().correct(read_point(record)).error > fix.error / 3


def test_covariance_of_identical_and_different_runs():
    widths = Widths((0.0, 0.0, 0.1, 0.0, 0.0), 0.2, (1.0,) * 13, (0.5,) * 14, 0.05)
    same = Features(np.array([["a"] * 13]), np.zeros((1, 14)))
    other = Features(np.array([["b", *["a"] * 12]]), np.eye(14)[:1] * 2)
    constant, similarity = covariance(same, same, widths)
    assert (constant[0, 0], similarity[0, 0]) == pytest.approx((0.01, 0.04))
    constant, similarity = covariance(same, other, widths)
    assert (constant[0, 0], similarity[0, 0]) == pytest.approx((0.0, 0.04 * math.exp(-2)))
