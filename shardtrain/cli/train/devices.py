"""The devices and strategy of a run."""

import math
import os
from dataclasses import dataclass

import jax

from shardtrain.errors import StrategyError
from shardtrain.launch.distributed import init_distributed
from shardtrain.mesh import simulate
from shardtrain.strategy import Strategy

VIRTUAL_DEVICES = 8
VIRTUAL_STRATEGY = "data=2,fsdp=2,tensor=2"
TRAINING_STRATEGY = "data=2,tensor=2,pipeline=2"  # our decoder has layers to split
MICROBATCHES = (4, 2, 1)
ACCELERATOR_STRATEGY = "fsdp=-1,precision=bf16"
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Devices:
    """What a run computes on.

    Args:
      strategy: The user's or the default one, gradients clipped.
      description: One line for the summary.
      is_virtual: CPU devices made for the occasion.
    """

    strategy: Strategy
    description: str
    is_virtual: bool


def choose_devices(
    strategy_text: str | None, num_virtual: int | None, batch: int | None = None
) -> Devices:
    """Join the other processes if there are any; use accelerators, or make virtual CPU devices.

    Args:
      strategy_text: The user's strategy, or None.
      num_virtual: Virtual devices the user asked for, or None.
      batch: Sequences per step of our own decoder; None: any model, which may have no layers.

    Raises:
      StrategyError: The string cannot be read, or virtual devices are asked for beside real ones.
    """
    asked = None if strategy_text is None else Strategy.parse(strategy_text)
    init_distributed()
    found = jax.devices()
    platform = found[0].platform
    if platform != "cpu" and num_virtual is not None:
        raise StrategyError(
            f"--devices {num_virtual} makes virtual CPU devices, but this machine has {len(found)} "
            f"{platform.upper()} devices. Set JAX_PLATFORMS=cpu to train on virtual ones"
        )
    is_virtual = platform == "cpu" and jax.process_count() == 1
    if is_virtual:
        wanted = num_virtual or _asked_for(asked)
        if len(found) != wanted:
            found = simulate(wanted, reset=True)
    strategy = asked or default_strategy(is_virtual, len(found), batch)
    if strategy.max_grad_norm is None:
        strategy = strategy.replace(max_grad_norm=MAX_GRAD_NORM)
    return Devices(strategy, _describe(found, is_virtual), is_virtual)


def default_strategy(is_virtual: bool, num_devices: int, batch: int | None = None) -> Strategy:
    """Three axes on eight virtual devices, to see them; fully sharded data parallel elsewhere."""
    if is_virtual and num_devices == VIRTUAL_DEVICES:
        if batch is None:
            return Strategy.parse(VIRTUAL_STRATEGY)
        strategy = Strategy.parse(TRAINING_STRATEGY)
        count = next((n for n in MICROBATCHES if batch % (n * strategy.data) == 0), 1)
        return strategy.replace(num_microbatches=count)
    return Strategy.parse("fsdp=-1" if is_virtual else ACCELERATOR_STRATEGY)


def _asked_for(strategy: Strategy | None) -> int:
    sizes = [] if strategy is None else list(strategy.sizes.values())
    return VIRTUAL_DEVICES if not sizes or -1 in sizes else math.prod(sizes)


def _describe(devices: list[jax.Device], is_virtual: bool) -> str:
    if is_virtual:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{len(devices)} virtual CPU devices on {cores} cores (no accelerator here)"
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{processes}"
