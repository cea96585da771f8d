"""The time model's pieces against hand-computed values, and its directions."""

import pytest

from shardtrain.errors import HardwareError, MeshError, StrategyError
from shardtrain.hardware import chip, hardware
from shardtrain.planner.calibration import constants
from shardtrain.planner.catalogue import get
from shardtrain.planner.job import Job
from shardtrain.planner.search import Space, search_layouts
from shardtrain.planner.time import TERMS, step_terms
from shardtrain.planner.time_constants import Constants
from shardtrain.planner.time_estimate import estimate_step
from shardtrain.planner.topology import collective_seconds, group_bandwidth

H100 = chip("h100")


def test_ring_formulas():
    # 1 GB over 8 chips at 450 GB/s: 7/8 of it passes every link, an all-reduce twice.
    gather = collective_seconds("all-gather", 1e9, 8, H100, 8)
    assert gather == pytest.approx(1e9 * 7 / 8 / 450e9 + 4 * 4e-6)
    reduce = collective_seconds("all-reduce", 1e9, 8, H100, 8)
    assert reduce == pytest.approx(2e9 * 7 / 8 / 450e9 + 4 * 4e-6)
    assert collective_seconds("all-reduce", 1e9, 1, H100, 8) == 0


def test_wide_groups_share_the_cards_of_a_host():
    assert group_bandwidth(H100, 8, 8) == (450e9, 4e-6)
    assert group_bandwidth(H100, 64, 8)[0] == 8 * 50e9  # eight cards of 50 GB/s
    assert group_bandwidth(H100, 8, 8, stride=8)[0] == 50e9  # one chip per host: one card
    assert group_bandwidth(chip("gb200"), 64, 72)[0] == 900e9


def test_tpu_all_to_all_is_a_quarter():
    v5p = chip("v5p")
    gather = collective_seconds("all-gather", 1e12, 64, v5p, 64)
    exchange = collective_seconds("all-to-all", 1e12, 64, v5p, 64)
    assert exchange == pytest.approx(gather / 4, rel=1e-3)


def test_unknown_collective():
    with pytest.raises(HardwareError, match="did you mean 'all-reduce'"):
        collective_seconds("all-reduc", 1.0, 8, H100, 8)


def _job(**changes):
    base = Job(get("llama3-8b"), H100, 64, 8192, microbatch=1, num_microbatches=8, fsdp=64, zero=3)
    return base.replace(**changes)


def test_terms_are_named_and_positive():
    terms = step_terms(_job(), constants())
    assert tuple(terms) == TERMS
    assert all(seconds >= 0 for seconds in terms.values())
    assert terms["matmul"] > 0.3 * sum(terms.values())


def test_compute_is_at_least_the_flops_at_peak():
    job = _job()
    flops = job.step_tokens / job.chips * job.model.flops_per_token(8192)
    assert sum(step_terms(job, constants()).values()) > flops / H100.peak_flops()


def test_full_recomputation_repeats_one_forward():
    terms = step_terms(_job(remat="full"), constants())
    linear = terms["matmul"] / 3
    attention = terms["attention"] / 3.5
    assert terms["recompute"] == pytest.approx(linear + attention + terms["elementwise"] / 3)


@pytest.mark.parametrize(
    ("changes", "bubble"),
    [
        ({"pipeline": 4, "fsdp": 1, "num_microbatches": 8}, 3 / 8),
        ({"pipeline": 4, "fsdp": 1, "num_microbatches": 8, "schedule": "interleaved",
          "virtual_stages": 2}, 3 / 16),
        ({"pipeline": 4, "fsdp": 1, "num_microbatches": 8, "schedule": "zero-bubble"}, 1 / 8),
        ({}, 0.0),
    ],
)  # fmt: skip
def test_bubble(changes, bubble):
    assert _job(**changes).bubble_fraction == pytest.approx(bubble)


def test_directions():
    total = lambda **c: sum(step_terms(_job(**c), constants()).values())
    assert total(precision="fp8") < total()
    assert total(remat="full") > total(remat="selective") > total()
    assert total(flash=False) > total()
    assert total(causal=False) > total()
    assert total(offload=True) > total()
    slow = {"tensor": 16, "fsdp": 4, "microbatch": 16, "num_microbatches": 8}
    assert total(**slow) > total(**{**slow, "tensor": 8, "fsdp": 8, "microbatch": 8})


def test_constants_are_physical():
    rates = constants()
    assert 0.6 <= rates.matmul <= 1.0
    assert 0.5 <= rates.link <= 0.95
    assert rates != Constants()


def test_estimate_step_adds_up():
    found = estimate_step(
        4e14, 1e12, [("all-reduce", 2e9, ("data",), 3)], {"data": 8, "tensor": 8}, "h100:8x8",
        bubble_fraction=0.2,
    )  # fmt: skip
    assert sum(found.terms.values()) == pytest.approx(found.step_time)
    busy = sum(v for k, v in found.terms.items() if k not in {"bubble", "fixed"})
    assert found.terms["bubble"] == pytest.approx(0.25 * busy)
    # stride 8 on hosts of 8: one 50 GB/s card
    wire = 3 * (2 * 2e9 * 7 / 8 / 50e9)
    assert found.communication["communication data"] > wire
    assert 0 < found.mfu < 0.8


def test_estimate_step_hides_asynchronous_collectives():
    class Async:
        kind, bytes, axes, count, is_async = "all-gather", 1e9, ("data",), 1, True

    args = ({"data": 8}, "h100:1x8")
    shown = estimate_step(4e14, 0, [Async()], *args).terms["communication data"]
    plain = estimate_step(4e14, 0, [("all-gather", 1e9, ("data",), 1)], *args)
    assert shown == pytest.approx(0.25 * plain.terms["communication data"])
    exposed = estimate_step(0, 0, [Async()], *args).terms["communication data"]
    assert exposed == pytest.approx(plain.terms["communication data"])


def test_estimate_step_unknown_axis():
    with pytest.raises(MeshError, match="'model'"):
        estimate_step(1.0, 1.0, [("all-reduce", 1.0, ("model",), 1)], {"data": 8}, hardware("h100"))


def test_search_ranks_and_explains():
    found = search_layouts("llama3-8b", "h100:8x8", 512, 8192)
    times = [one.step_time for one in found.ranked]
    assert times == sorted(times)
    assert found.best.reason.startswith("fastest")
    assert all("slower" in one.reason for one in found.ranked[1:])
    assert all(one.memory.total < 80e9 for one in found.ranked)
    assert all(one.reason for one in found.pruned)
    assert any("remat=full saves" in one.reason for one in found.pruned)
    sizes = found.best.strategy
    assert sizes.data * sizes.fsdp * sizes.tensor * sizes.pipeline * sizes.expert == 64


def test_search_when_nothing_fits_says_what_would():
    found = search_layouts("llama3-405b", "h100:1x8", 8, 8192)
    assert not found.ranked
    with pytest.raises(StrategyError, match=r"needs .* GB, device has .*h100:\d+x8 has a layout"):
        _ = found.best


def test_search_space_is_obeyed():
    space = Space(tensor=(8,), pipeline=(1,), remat=("full",), microbatch=(1,), offload=(False,))
    found = search_layouts("llama3-70b", "h100:8x8", 64, 8192, space)
    assert found.ranked
    assert {one.strategy.tensor for one in found.ranked} == {8}
    assert {one.strategy.remat for one in found.ranked} == {"full"}
