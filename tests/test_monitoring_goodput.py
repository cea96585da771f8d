"""Goodput against published and independently computed numbers."""

import pytest

from shardtrain.errors import ShardtrainError
from shardtrain.monitoring.goodput import (
    LLAMA_3_405B,
    best_interval,
    expected_goodput,
    goodput_report,
    replay,
)

UNEXPECTED_ONLY = 54 * 24 * 3600 / 419  # 3.093 h: the interval the worked table is made for


@pytest.mark.parametrize(
    ("stall", "minutes", "goodput"),
    [  # worked values of the exact formula for M = 3.09 h
        (10, 2, 0.948), (10, 5, 0.933), (10, 10, 0.908),
        (30, 2, 0.918), (30, 5, 0.904), (30, 10, 0.880),
        (60, 2, 0.890), (60, 5, 0.876), (60, 10, 0.853),
        (0.5, 0.5, 0.9879), (0.5, 10, 0.9386), (1, 0.5, 0.984),
    ],
)  # fmt: skip
def test_published_worked_table(stall, minutes, goodput):
    m = UNEXPECTED_ONLY
    best = best_interval(m, stall)
    assert expected_goodput(m, best, stall, minutes * 60) == pytest.approx(goodput, abs=6e-4)


def test_best_interval_is_a_maximum_and_agrees_with_dalys_series():
    m, stall = UNEXPECTED_ONLY, 30.0
    best = best_interval(m, stall)
    top = expected_goodput(m, best, stall, 60)
    assert top > expected_goodput(m, best * 1.02, stall, 60)
    assert top > expected_goodput(m, best / 1.02, stall, 60)
    # sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d
    assert best == pytest.approx(797.5, abs=0.1)


def test_llama_3_failure_rate():
    assert LLAMA_3_405B.mean_time_between(16384) / 3600 == pytest.approx(2.7811, abs=1e-4)
    # 45,566 h per device
    assert LLAMA_3_405B.mean_time_between(1) / 3600 == pytest.approx(45566, abs=1)
    assert LLAMA_3_405B.mean_time_between(8) == 2 * LLAMA_3_405B.mean_time_between(16)


def test_replay_accounts_for_every_second_and_agrees_with_the_formula():
    m = LLAMA_3_405B.mean_time_between(16384)
    played = replay(m, 500, 10, 300, duration=4000 * 24 * 3600, seed=1)
    parts = played.useful + played.stalled + played.recovering + played.repeated
    assert parts == pytest.approx(played.total, rel=1e-9)
    assert played.goodput == pytest.approx(expected_goodput(m, 500, 10, 300), abs=2e-3)
    assert played.failures == pytest.approx(4000 * 466 / 54, rel=0.02)


def test_replay_without_failures_loses_only_the_stalls():
    played = replay(1e18, 90, 10, 300, duration=1e5)
    assert (played.goodput, played.failures) == (0.9, 0)


def test_report_and_wrong_numbers():
    text = goodput_report(16384, stall=0.5, recovery=60.0)
    assert "one interruption every 2.78 h" in text
    assert "save every 100 s (stall 0.5 s), recovery 60 s" in text
    assert "expected goodput 98.41 %" in text
    with pytest.raises(ShardtrainError, match="must be positive"):
        expected_goodput(0, 1, 1, 1)
    with pytest.raises(ShardtrainError, match="at least 1"):
        LLAMA_3_405B.mean_time_between(0)
