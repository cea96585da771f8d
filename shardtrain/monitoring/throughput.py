"""How fast a run is: seconds per step, tokens per second, MFU where the chip is known."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax

from shardtrain.hardware import CHIPS, Chip

# Patterns of `jax.Device.device_kind` and the chip they mean, most specific first.
_KINDS = (
    (r"GH200", "gh200"),
    (r"GB200|B200", "b200"),
    (r"H200", "h200"),
    (r"H100", "h100"),
    (r"A100.*40GB", "a100-40gb"),
    (r"A100", "a100"),
    (r"V100", "v100"),
    (r"TPU ?v?7", "tpu7x"),
    (r"TPU v6", "v6e"),
    (r"TPU v5 ?(lite|e)", "v5e"),
    (r"TPU v5", "v5p"),
    (r"TPU v4", "v4"),
    (r"TPU v3", "v3"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind JAX's `device_kind`, or None where it is not in the table (any CPU).

    Example:
      >>> chip_of("NVIDIA H100 80GB HBM3").name
      'h100'
      >>> chip_of("cpu") is None
      True
    """
    for pattern, name in _KINDS:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return CHIPS.get(name)
    return None


def model_flops_per_token(num_params: int) -> float:
    """Operations of forward and backward per token: 6 per parameter (Kaplan et al. 2020).

    Attention scores and recomputation are not counted.
    """
    return 6.0 * num_params


class Rate:
    """Seconds per step, smoothed over the last few; pauses between steps can be left out.

    Args:
      smoothing: Weight of the newest interval.
      clock: Seconds, monotonic.

    Example:
      >>> times = iter([0.0, 2.0, 4.0])
      >>> rate = Rate(clock=lambda: next(times))
      >>> rate.tick(), rate.tick(), rate.tick()
      (None, 2.0, 2.0)
    """

    def __init__(self, smoothing: float = 0.2, clock: Callable[[], float] = time.perf_counter):
        self._smoothing = smoothing
        self._clock = clock
        self._last: float | None = None
        self.seconds: float | None = None

    def tick(self) -> float | None:
        """One more step is done; the smoothed seconds per step, None before the second."""
        now = self._clock()
        if self._last is not None:
            interval = now - self._last
            previous = interval if self.seconds is None else self.seconds
            self.seconds = previous + self._smoothing * (interval - previous)
        self._last = now
        return self.seconds

    def pause(self) -> None:
        """What happens until the next `tick` (an evaluation) is no training step."""
        self._last = None


def flops_of(plan: Any, tokens_per_step: int | None) -> tuple[float, float] | None:
    """(model operations per step, peak operations per second of all devices), where known.

    Args:
      plan: Gives the parameters, the mesh and the precision.
      tokens_per_step: None for models that do not read tokens: their operations are not known.
    """
    if not isinstance(plan.mesh, jax.sharding.Mesh) or tokens_per_step is None:
        return None
    devices = list(plan.mesh.devices.flat)
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return None
    num_params = sum(leaf.size for leaf in jax.tree.leaves(plan.abstract_state.params))
    dtype = "bf16" if plan.strategy.precision == "bf16" else "fp32"
    peak = chip.peak_flops(dtype) / chip.devices_per_chip * len(devices)
    return model_flops_per_token(num_params) * tokens_per_step, peak
