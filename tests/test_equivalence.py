"""The equivalence table: model families x strategies, each equal to one device.

A cheap model runs under every strategy; each of the others under two, chosen by turns so that
every strategy meets two families or more. `SHARDTRAIN_EQUIVALENCE=all` runs every pair (about 15
minutes).
"""

import functools
import math
import os
import re

import jax
import numpy as np
import pytest
from equivalence import differences, one_step, starting_point
from zoo import ZOO

import shardtrain as st

STRATEGIES = (
    "data=8",
    "data=2,fsdp=2,tensor=2",
    "fsdp=8",
    "data=4,num_microbatches=2",
    "data=2,fsdp=4,zero=1",
    "data=4,tensor=2",
    "data=2,fsdp=4,zero=2",
    "fsdp=4,data=2,num_microbatches=2",
    "data=2,fsdp=4,zero=3",
    "data=4,context=2",
    "data=8,remat=full",
    "tensor=2,fsdp=2,num_microbatches=2",
    "data=2,expert=2,tensor=2",
    "data=2,fsdp=2,zero=0",
    "data=4,precision=bf16",
    "fsdp=4,remat=dots,precision=bf16",
)
# Strategies that split the sequence, layers or channels, on models they apply to.
FITTING = (
    ("resnet", "data=4,tensor=2"),
    ("llama-targets", "data=2,context=2,tensor=2,sequence_parallel=True,remat=full"),
    ("llama-targets", "data=4,pipeline=2,num_microbatches=2"),
    ("llama-targets", "data=2,context=2,pipeline=2,num_microbatches=2"),
    ("scan-linen-targets", "fsdp=2,tensor=2,pipeline=2,num_microbatches=2,precision=bf16"),
    ("gpt-targets", "data=4,tensor=2,sequence_parallel=True"),
    ("gpt-targets", "data=2,fsdp=2,context=2"),
    ("moe-targets", "fsdp=2,tensor=4,sequence_parallel=True,num_microbatches=2"),
    ("scan-linen-targets", "data=2,fsdp=2,tensor=2,sequence_parallel=True"),
    ("scan-linen-targets", "data=2,context=4"),
    ("scan-nnx-targets", "data=2,tensor=4,sequence_parallel=True,remat=full"),
)
CHEAP = ("functional",)
BF16_TOLERANCE = 5e-2
"""bfloat16 keeps 8 bits: 4e-3 for each rounding, a dozen roundings deep; against float32."""


def pairs() -> list[tuple[str, str]]:
    """Which models meet which strategies."""
    if os.environ.get("SHARDTRAIN_EQUIVALENCE") == "all":
        return [(name, s) for name in ZOO for s in STRATEGIES] + list(FITTING)
    chosen = [(name, s) for name in CHEAP for s in STRATEGIES] + list(FITTING)
    turn = 0
    for name in ZOO:
        if name not in CHEAP and not name.endswith("-targets"):
            chosen += [(name, STRATEGIES[(turn + i) % len(STRATEGIES)]) for i in range(2)]
            turn += 2
    return chosen


@functools.cache
def start_of(name: str):
    return starting_point(ZOO[name], jax.devices())


@functools.cache
def one_device(name: str, num_microbatches: int):
    case = ZOO[name]
    strategy = st.Strategy(num_microbatches=num_microbatches)
    return one_step(case, strategy, jax.devices()[:1], start_of(name))


@pytest.mark.parametrize(("name", "text"), pairs())
def test_equals_one_device(devices, name, text):
    case, strategy = ZOO[name], st.Strategy.parse(text)
    used = devices[: math.prod(strategy.sizes.values())]
    # A loss that is a mean over examples must not depend on the microbatches at all; of one that
    # returns a number, the weight counts them.
    parts = 1 if case.splits and not case.scalar else strategy.num_microbatches
    wanted = one_device(name, parts)
    found = one_step(case, strategy, used, start_of(name))
    tolerance = case.tolerance if strategy.precision == "fp32" else BF16_TOLERANCE
    lines = differences(found, wanted, tolerance)
    assert not lines, f"{name} under {text}:\n" + "\n".join(lines)


def test_the_table_is_wide_enough():
    """At least 12 families and 12 strategies; every strategy meets two families or more."""
    met = {text: {name for name, s in pairs() if s == text} for text in STRATEGIES}
    assert len(ZOO) >= 12
    assert len(STRATEGIES) >= 12
    assert all(len(names) >= 2 for names in met.values()), met


def test_the_comparison_finds_planted_faults():
    """A comparison that cannot fail proves nothing."""
    wanted = one_device("functional", 1)
    grads = dict(wanted.grads)
    path = "w/0"
    for fault, expected in [
        (lambda g: 2 * g, rf"gradient of {path}: .*ratio 2\.0000"),
        (lambda g: np.zeros_like(g), f"gradient of {path}"),
        (lambda g: np.roll(g, 1, 0), f"gradient of {path}"),
        (lambda g: g * np.nan, f"gradient of {path}"),
    ]:
        found = type(wanted)(**{**vars(wanted), "grads": {**grads, path: fault(grads[path])}})
        lines = differences(found, wanted, 1e-5)
        assert len(lines) == 1
        assert re.match(expected, lines[0])
    worse = type(wanted)(**{**vars(wanted), "loss": wanted.loss * 1.001})
    assert differences(worse, wanted, 1e-5)[0].startswith("loss")
    assert differences(wanted, wanted, 1e-5) == []
