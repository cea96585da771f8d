"""Name the slow process and what it is slow at, from host-side times of all processes.

In synchronous training every step takes as long as the slowest process, so step times are equal
everywhere and say nothing. What differs is the phase: the slow process spends the extra time in its
own work, all others spend it waiting.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jax.experimental import multihost_utils

from shardtrain.monitoring.progress import PHASES

OWN_PHASES = ("data", "dispatch", "ckpt", "eval")
"""Phases in which a process works for itself; only these are compared. Dispatch may also wait."""

StepTimes = Mapping[int, Mapping[str, float]]
"""Step → phase → seconds, of one process."""


@dataclass(frozen=True)
class Straggler:
    """One process slowed the run down in `phase` for the last `num_steps` steps.

    Attributes:
      seconds: its median time per step in that phase.
      others: median of the other processes' times, in seconds.
      slowdown: step time with it over step time without it.
    """

    process_index: int
    phase: str
    num_steps: int
    seconds: float
    others: float
    slowdown: float

    def __str__(self) -> str:
        return (
            f"process {self.process_index} is {self.slowdown:.1f}x slower, in "
            f"{PHASES[self.phase]}, for {self.num_steps} steps "
            f"({self.seconds:.3g} s per step, the others {self.others:.3g} s)"
        )


def find_stragglers(
    times: Mapping[int, StepTimes], *, min_slowdown: float = 1.1, min_steps: int = 5
) -> tuple[Straggler, ...]:
    """Processes that have been holding up the others in each of the latest steps.

    Args:
      times: process → step → phase → seconds. Steps missing on one process are ignored.
      min_slowdown: step time with the process over step time without it that is worth a word.
      min_steps: consecutive latest steps for which it must have lasted.

    Returns:
      Worst first; empty with fewer than 2 processes.

    Example:
      >>> slow = {s: {"data": 0.9, "dispatch": 0.1, "wait": 0.0} for s in range(40)}
      >>> fast = {s: {"data": 0.1, "dispatch": 0.1, "wait": 0.8} for s in range(40)}
      >>> print(*find_stragglers({0: fast, 1: fast, 2: slow}))
      process 2 is 5.0x slower, in data loading, for 40 steps (0.9 s per step, the others 0.1 s)
    """
    if len(times) < 2:
        return ()
    steps = sorted(set.intersection(*(set(t) for t in times.values())))
    found = []
    for process_index in times:
        for phase in OWN_PHASES:
            rows = _latest_slow_rows(times, process_index, phase, steps, min_slowdown)
            if len(rows) >= min_steps:
                found.append(_summarise(process_index, phase, rows))
    return tuple(sorted(found, key=lambda s: -s.slowdown))


def _latest_slow_rows(
    times: Mapping[int, StepTimes],
    process_index: int,
    phase: str,
    steps: Sequence[int],
    min_slowdown: float,
) -> list[tuple[float, float, float]]:
    """(own seconds, seconds of the others, slowdown) for the run of slow steps at the end."""
    rows = []
    for step in reversed(steps):
        own = times[process_index][step].get(phase, 0.0)
        if phase == "dispatch":
            own = max(own - _waited(times, process_index, step), 0.0)
        others = statistics.median(
            t[step].get(phase, 0.0) for p, t in times.items() if p != process_index
        )
        total = sum(times[process_index][step].values())
        without = max(total - max(own - others, 0.0), 1e-9)
        if total / without < min_slowdown:
            break
        rows.append((own, others, total / without))
    return rows


def _waited(times: Mapping[int, StepTimes], process_index: int, step: int) -> float:
    """Seconds that others worked longer before their dispatch: a dispatch may block on them.

    It does with gloo, and wherever the queue of the device is full.
    """
    work = {
        p: sum(t[step].get(phase, 0.0) for phase in OWN_PHASES if phase != "dispatch")
        for p, t in times.items()
    }
    return max(work.values()) - work[process_index]


def _summarise(
    process_index: int, phase: str, rows: Sequence[tuple[float, float, float]]
) -> Straggler:
    own, others, slowdown = (statistics.median(column) for column in zip(*rows, strict=True))
    return Straggler(process_index, phase, len(rows), own, others, slowdown)


def gather_step_times(
    times: StepTimes,
    num_steps: int = 32,
    gather: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[int, StepTimes]:
    """The latest step times of all processes, for `find_stragglers`. Collective.

    Args:
      times: of this process, `Progress.step_times()`.
      num_steps: how many steps to send; equal on all processes.
      gather: `int32[n, m]` of this process to `int32[processes, n, m]` of all; default: over the
        accelerators' network.
    """
    table = np.full((num_steps, 1 + len(PHASES)), -1, np.int32)
    latest = sorted(times)[-num_steps:]
    for row, step in zip(table, latest, strict=False):
        # Microseconds in 32 bits: JAX would round 64-bit floats anyway. 2147 s is the longest.
        seconds = [times[step].get(phase, 0.0) for phase in PHASES]
        row[:] = [step, *(min(int(s * 1e6), 2**31 - 1) for s in seconds)]
    rows = (gather or multihost_utils.process_allgather)(table).reshape(-1, *table.shape)
    return {
        process_index: {
            int(row[0]): {p: int(t) / 1e6 for p, t in zip(PHASES, row[1:], strict=True) if t > 0}
            for row in own
            if row[0] >= 0
        }
        for process_index, own in enumerate(rows)
    }
