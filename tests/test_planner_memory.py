"""Published memory tables, to the printed digit."""

import pytest

from shardtrain.errors import StrategyError
from shardtrain.hardware import chip
from shardtrain.planner.catalogue import get
from shardtrain.planner.job import Job
from shardtrain.planner.memory import in_flight, job_memory
from shardtrain.planner.memory_published import (
    ACTIVATIONS,
    activation_bytes,
    deepspeed_states,
    extra_bytes,
    first_stage_bytes,
    interleave_factor,
    zero_states,
)

# arXiv:1910.02054, Figure 1 and Table 1: parameters, devices, GB of (nothing, os, os+g, os+g+p).
ZERO = [
    (7.5e9, 1, 120.0, 120.0, 120.0, 120.0),
    (7.5e9, 4, 120.0, 52.5, 41.25, 30.0),
    (7.5e9, 16, 120.0, 35.625, 21.562, 7.5),
    (7.5e9, 64, 120.0, 31.406, 16.641, 1.875),
    (7.5e9, 256, 120.0, 30.352, 15.41, 0.469),
    (7.5e9, 1024, 120.0, 30.088, 15.103, 0.117),
    (128e9, 4, 2048.0, 896.0, 704.0, 512.0),
    (128e9, 64, 2048.0, 536.0, 284.0, 32.0),
    (128e9, 1024, 2048.0, 513.5, 257.75, 2.0),
    (1e12, 4, 16000.0, 7000.0, 5500.0, 4000.0),
    (1e12, 16, 16000.0, 4750.0, 2875.0, 1000.0),
    (1e12, 64, 16000.0, 4187.5, 2218.75, 250.0),
    (1e12, 1024, 16000.0, 4011.719, 2013.672, 15.625),
]


@pytest.mark.parametrize("row", ZERO)
def test_zero_table(row):
    params, devices, *published = row
    ours = [zero_states(params, devices, level) / 1e9 for level in range(4)]
    assert [abs(a - b) < 1e-3 for a, b in zip(ours, published, strict=True)] == [True] * 4


def test_deepspeed_goldens():
    # microsoft/DeepSpeed docs/code-docs/source/memory.rst
    large, small = (2851e6, 8), (737.67e6, 4)
    gib, mib = 2**30, 2**20
    assert round(deepspeed_states(*large, 2) / gib, 2) == 15.93
    assert round(deepspeed_states(*large, 2, offload="optimizer") / gib, 2) == 5.31
    assert round(deepspeed_states(*large, 3, 32e6) / gib, 2) == 6.09
    assert round(deepspeed_states(*large, 3, 32e6, "optimizer") / gib, 2) == 0.78
    assert round(deepspeed_states(*large, 3, 32e6, "all") / gib, 2) == 0.12
    assert int(deepspeed_states(*small, 3, 32.9e6) / mib) == 3291
    assert int(deepspeed_states(*small, 3, 32.9e6, "all") / mib) == 125
    assert int(deepspeed_states(*small, 3, 32.9e6, "optimizer") / mib) == 477


# arXiv:2205.05198 Table 3 models: s, b, h, a, L, t, then MiB per layer and GiB of the first stage
# for (no parallelism, TP, TP+SP, TP+selective, TP+SP+selective, full recompute).
KORTHIKANTI = [
    ((2048, 4, 6144, 64, 48, 8), (6752.0, 1264.0, 844.0, 624.0, 204.0, 96.0),
     (316.5, 59.25, 39.56, 29.25, 9.56, 4.5)),
    ((2048, 1, 12288, 96, 96, 8), (2736.0, 552.0, 342.0, 312.0, 102.0, 48.0), None),
    ((2048, 1, 20480, 128, 105, 8), (3920.0, 840.0, 490.0, 520.0, 170.0, 80.0), None),
    ((2048, 1, 25600, 160, 128, 8), (4900.0, 1050.0, 612.5, 650.0, 212.5, 100.0),
     (612.5, 131.25, 76.56, 81.25, 26.56, 12.5)),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "per_layer", "first_stage"), KORTHIKANTI)
def test_korthikanti(shape, per_layer, first_stage):
    s, b, h, a, layers, t = shape
    ours = tuple(activation_bytes(s, b, h, a, t, kind) / 2**20 for kind in
                 ("none", "tensor", "tensor+sequence", "tensor+selective",
                  "tensor+sequence+selective", "full"))  # fmt: skip
    assert ours == per_layer
    if first_stage:
        kinds = zip(ACTIVATIONS, first_stage, strict=True)
        for kind, published in kinds:
            found = first_stage_bytes(s, b, h, a, layers, t, kind) / 2**30
            assert round(found, 2) == published


def test_interleaving_and_first_stage_of_175b():
    # 175B: p=8, m=3 chunks; 530B: p=35, m=3
    assert round(interleave_factor(8, 3), 4) == 1.2917
    assert round(interleave_factor(35, 3), 4) == 1.3238
    assert interleave_factor(64, 1) == 1.0
    plain = first_stage_bytes(2048, 1, 12288, 96, 96, 8, "tensor+sequence+selective")
    assert round(plain * interleave_factor(8, 3) / 2**30, 2) == 12.35


def test_extra_bytes_of_22b():
    # sbhL/t * (p/L + 4/L (1 + v/h)): 2048*4*6144/8 * (1 + 4 (1 + 51200/6144))
    assert extra_bytes(2048, 4, 6144, 51200, 48, 8, 1) == pytest.approx(241172480.0)
    assert extra_bytes(2048, 1, 12288, 51200, 96, 8, 8) == 2048 * 12288


def test_unknown_kind_names_the_nearest():
    with pytest.raises(StrategyError, match="did you mean 'tensor\\+sequence'"):
        activation_bytes(1, 1, 1, 1, 1, "tensor+sequnce")
    with pytest.raises(StrategyError, match="not 1"):
        deepspeed_states(1e9, 8, 1)


def test_job_states_are_zero_states():
    model = get("llama3-8b")
    for zero in (0, 1):
        job = Job(model, chip("h100"), 8, 4096, fsdp=1, zero=zero, gradient_bytes=2.0)
        norms = model.params - model.block_matmul - 2 * model.vocab * model.d_model
        expected = zero_states(model.params - norms, 8, zero)
        assert job_memory(job).states == pytest.approx(expected)


def test_sharding_and_recomputation_save():
    base = Job(get("llama3-8b"), chip("h100"), 64, 8192, fsdp=64, zero=3)
    full = job_memory(base.replace(remat="full"))
    assert full.activations < 0.1 * job_memory(base).activations
    wide = job_memory(base.replace(tensor=8, sequence_parallel=True, fsdp=8))
    assert wide.activations == pytest.approx(job_memory(base).activations / 8)
    assert wide.states == pytest.approx(job_memory(base).states)
    assert job_memory(base.replace(offload=True)).optimizer == 0


def test_experts_are_divided_once():
    mixtral = get("mixtral-8x7b")
    base = Job(mixtral, chip("h100"), 64, 4096, fsdp=64, zero=3)
    split = base.replace(expert=8)
    assert job_memory(split).states == pytest.approx(job_memory(base).states)


def test_in_flight():
    base = Job(get("gpt3-175b"), chip("a100"), 64, 2048, num_microbatches=64, tensor=8, pipeline=8)
    assert in_flight(base) == 8
    assert in_flight(base.replace(schedule="gpipe")) == 64
    assert in_flight(base.replace(virtual_stages=3)) == pytest.approx(8 * 1.2917, rel=1e-4)
    assert in_flight(base.replace(pipeline=1)) == 1
