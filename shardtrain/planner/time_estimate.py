"""Roofline time of a step whose FLOPs, bytes and collectives are known (counted or compiled)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from shardtrain.errors import MeshError
from shardtrain.hardware import Hardware, hardware
from shardtrain.planner.calibration import constants
from shardtrain.planner.topology import PASSES, collective_seconds

_KINDS = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "broadcast"}
_OVERLAPPED = 0.25
"""Share of a collective that stays visible although the program starts it asynchronously."""


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of one step.

    Attributes:
        step_time: seconds.
        terms: named seconds that sum to `step_time`: compute, memory (time beyond compute in which
            the device waits for its memory), communication by mesh axes, bubble, fixed.
        mfu: model FLOPs over peak FLOPs of the time.
        communication: seconds each group of axes keeps the links busy, hidden or not.
    """

    step_time: float
    terms: Mapping[str, float]
    mfu: float
    communication: Mapping[str, float]

    def __rich__(self) -> Table:
        table = Table("term", "seconds", "share", title=f"step {self.step_time:.4g} s")
        for name, seconds in self.terms.items():
            table.add_row(name, f"{seconds:.4g}", f"{seconds / self.step_time:.1%}")
        table.add_row("MFU", "", f"{self.mfu:.1%}")
        return table


def estimate_step(
    flops: float,
    hbm_bytes: float,
    collectives: Iterable[Any],
    axis_sizes: Mapping[str, int],
    hardware_: str | Hardware,
    bubble_fraction: float = 0.0,
    *,
    dtype: str = "bf16",
    model_flops: float | None = None,
    slow_axes: Iterable[str] = (),
    fixed: float = 0.0,
) -> StepEstimate:
    """Roofline estimate of one step on one device (all figures are of one device).

    Compute and memory traffic overlap (the larger counts); collectives are added at their full
    time, those the program starts asynchronously at a quarter of it unless they exceed compute.

    Args:
        flops: FLOPs the program executes, recomputation included.
        hbm_bytes: bytes it moves to and from device memory.
        collectives: objects with `kind`, `bytes`, `axes`, `count` (and `is_async`), or tuples of
            the four. `bytes` is the gathered result of an all-gather and the input of all others.
        axis_sizes: mesh axis -> size, in mesh order (the last axis joins neighbouring devices).
        hardware_: chips, as a string or `Hardware`.
        bubble_fraction: idle share of the step, (p-1)/(m+p-1) for 1F1B.
        dtype: of the matmuls.
        model_flops: FLOPs that count for MFU; None: `flops`.
        slow_axes: axes whose groups span slices or hosts joined by the network only.
        fixed: seconds added as they are (host work, offload).

    Raises:
        MeshError: a collective names an axis that `axis_sizes` lacks.

    Example:
        >>> est = estimate_step(4e14, 1e12, [("all-reduce", 2e9, ("data",), 1)], {"data": 8},
        ...                     "h100:1x8")
        >>> 0.5 < est.step_time < 0.7, sorted(est.terms)[:2]
        (True, ['bubble', 'communication data'])
    """
    machine = hardware(hardware_)
    rates = constants()
    rate = machine.chip.matmul_flops(dtype) / machine.chip.devices_per_chip * rates.matmul
    compute = flops / rate
    traffic = hbm_bytes * machine.chip.devices_per_chip / machine.chip.memory_bandwidth
    terms = {"compute": compute, "memory": max(0.0, traffic - compute)}
    busy: dict[str, float] = {}
    hidden: dict[str, float] = {}
    for item in collectives:
        kind, payload, axes, count, is_async = _read(item)
        name = "communication " + "+".join(axes)
        seconds = count * _seconds(kind, payload, axes, axis_sizes, machine, set(slow_axes))
        busy[name] = busy.get(name, 0.0) + seconds
        shown = seconds * (_OVERLAPPED if is_async else 1.0)
        terms[name] = terms.get(name, 0.0) + shown
        hidden[name] = hidden.get(name, 0.0) + seconds - shown
    spill = sum(hidden.values()) - 0.9 * compute
    if spill > 0:  # more to hide than there is compute to hide it behind
        total = sum(hidden.values())
        for name, seconds in hidden.items():
            terms[name] += spill * seconds / total
    active = sum(terms.values())
    terms["bubble"] = active * bubble_fraction / (1 - bubble_fraction)
    terms["fixed"] = fixed
    step = sum(terms.values())
    peak = machine.chip.peak_flops(dtype) / machine.chip.devices_per_chip
    useful = flops if model_flops is None else model_flops
    return StepEstimate(step, terms, useful / (step * peak) if step else 0.0, busy)


def _read(item: Any) -> tuple[str, float, tuple[str, ...], float, bool]:
    if isinstance(item, tuple):
        kind, payload, axes, count = item
        is_async = False
    else:
        kind, payload, axes = item.kind, item.bytes, item.axes
        count = item.count / getattr(item, "every", 1)
        is_async = bool(getattr(item, "is_async", False))
        axes = axes if axes != ("?",) else (getattr(item, "within", ()) or axes)
    return _KINDS.get(kind, kind), payload, tuple(axes), count, is_async


def _seconds(kind: str, payload: float, axes: tuple[str, ...], sizes: Mapping[str, int],
             machine: Hardware, slow: set[str]) -> float:  # fmt: skip
    """One collective over some mesh axes, at the bandwidth software reaches."""
    chip, rates = machine.chip, constants()
    unknown = [name for name in axes if name not in sizes and name != "?"]
    if unknown:
        raise MeshError(f"collective over axis {unknown[0]!r}; the mesh has {list(sizes)}")
    if axes == ("?",):
        axes = tuple(sizes)
    names = list(sizes)
    size = math.prod(sizes[name] for name in axes)
    last = max((names.index(name) for name in axes), default=len(names) - 1)
    stride = math.prod(sizes[name] for name in names[last + 1 :])
    domain = machine.domain_size * chip.devices_per_chip
    if slow & set(axes):
        domain = 1
    kind = kind if kind in PASSES else "all-to-all"
    ideal = collective_seconds(kind, payload, size, chip, domain, stride)
    if chip.torus and size * stride < domain:
        # an axis of a torus uses the links of the dims it lies along only
        ideal *= max(1.0, chip.torus / max(1, round(chip.torus * math.log(max(size, 2), domain))))
    return ideal / rates.link
