"""How much of the machine's time becomes training progress, given failures, stalls and recovery.

Model (Young 1974, exact form by Daly 2006): failures come at random with mean time M between them.
A run computes for an interval `tau`, then stalls `delta` to save; after a failure it needs `R` to
be running again and repeats what was not saved. The expected time for one saved interval is
`M e^(R/M) (e^((tau+delta)/M) - 1)`, and goodput is `tau` over that.

The failure rate of a big run is public: Llama 3 405B on 16,384 GPUs had 466 interruptions in 54
days (arXiv:2407.21783, section 3.3.4), 47 of them planned.
"""

import math
import random
from dataclasses import dataclass

from shardtrain.errors import ShardtrainError

_HOUR = 3600.0


@dataclass(frozen=True)
class FailureRecord:
    """Interruptions of one published run.

    Args:
      devices: accelerators of the run.
      days: length of the observation.
      interruptions: all that ended the run, planned ones included.
      source: where that is published.

    Example:
      >>> round(LLAMA_3_405B.mean_time_between(16384) / 3600, 2)
      2.78
    """

    devices: int
    days: float
    interruptions: int
    source: str

    def mean_time_between(self, devices: int) -> float:
        """Seconds between interruptions at another size; each device fails independently."""
        if devices < 1:
            raise ShardtrainError(f"{devices} devices: must be at least 1")
        return self.days * 24 * _HOUR / self.interruptions * self.devices / devices


LLAMA_3_405B = FailureRecord(16384, 54, 466, "arXiv:2407.21783, section 3.3.4 and table 5")
"""466 interruptions in 54 days on 16,384 H100."""


def expected_goodput(
    mean_time_between: float, interval: float, stall: float, recovery: float
) -> float:
    """Fraction of time that becomes progress, in closed form.

    Args:
      mean_time_between: seconds between failures (M).
      interval: seconds of computing between two saves (tau).
      stall: seconds a save blocks the computation (delta).
      recovery: seconds from a failure to the first new step, without the repeated work (R).

    Example:
      >>> round(expected_goodput(3.093 * 3600, interval=472.0, stall=10.0, recovery=120.0), 3)
      0.948
    """
    _check(mean_time_between, interval, stall, recovery)
    m = mean_time_between
    return interval / (m * math.exp(recovery / m) * math.expm1((interval + stall) / m))


def best_interval(mean_time_between: float, stall: float) -> float:
    """Seconds between saves that give the highest goodput; independent of the recovery time.

    Solves the derivative of the closed form by bisection. `sqrt(2 stall M)` (Young) is its limit
    for short stalls.

    Example:
      >>> round(best_interval(3.093 * 3600, stall=10.0)), round((2 * 10 * 3.093 * 3600) ** 0.5)
      (465, 472)
    """
    _check(mean_time_between, 1.0, stall, 0.0)
    low, high = 0.0, mean_time_between
    # d/dtau (tau / (e^((tau+delta)/M) - 1)) = 0  <=>  1 - e^(-(tau+delta)/M) = tau / M
    while high - low > 1e-9 * mean_time_between:
        middle = (low + high) / 2
        if -math.expm1(-(middle + stall) / mean_time_between) > middle / mean_time_between:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Goodput:
    """Where the time of a replayed run went, in seconds; `goodput` is useful over total."""

    total: float
    useful: float
    stalled: float
    recovering: float
    repeated: float
    failures: int

    @property
    def goodput(self) -> float:
        """Useful over total time."""
        return self.useful / self.total


def replay(
    mean_time_between: float,
    interval: float,
    stall: float,
    recovery: float,
    *,
    duration: float,
    seed: int = 0,
) -> Goodput:
    """Play a run of `duration` seconds with random failures and account for every second.

    Args:
      mean_time_between, interval, stall, recovery: as in `expected_goodput`, in seconds.
      duration: seconds of wall time to play.
      seed: of the exponential times between failures.
    """
    _check(mean_time_between, interval, stall, recovery)
    draw = random.Random(seed)
    now, failure = 0.0, draw.expovariate(1 / mean_time_between)
    useful = stalled = recovering = repeated = 0.0
    failures = 0
    while now < duration:
        if now + interval + stall <= failure:
            now, useful, stalled = now + interval + stall, useful + interval, stalled + stall
            continue
        repeated += failure - now
        now, failures = failure, failures + 1
        # Failures go on while recovering: each starts the recovery again.
        while (failure := now + draw.expovariate(1 / mean_time_between)) < now + recovery:
            recovering, now, failures = recovering + failure - now, failure, failures + 1
        now, recovering = now + recovery, recovering + recovery
    return Goodput(now, useful, stalled, recovering, repeated, failures)


def goodput_report(
    devices: int,
    stall: float,
    recovery: float,
    *,
    interval: float | None = None,
    record: FailureRecord = LLAMA_3_405B,
) -> str:
    """What follows for `devices` accelerators that fail as often as those of `record`.

    Args:
      devices: size of the run.
      stall, recovery: measured seconds, as in `expected_goodput`.
      interval: seconds between saves; None takes the best.
      record: whose failure rate to use.

    Example:
      >>> print(goodput_report(16384, stall=0.5, recovery=60.0).splitlines()[0])
      16384 devices: one interruption every 2.78 h (as arXiv:2407.21783, section 3.3.4 and table 5)
    """
    m = record.mean_time_between(devices)
    tau = best_interval(m, stall) if interval is None else interval
    played = replay(m, tau, stall, recovery, duration=record.days * 24 * _HOUR)
    shares = [
        (name, 100 * seconds / played.total)
        for name, seconds in (
            ("saving", played.stalled),
            ("recovering", played.recovering),
            ("repeating", played.repeated),
        )
    ]
    return "\n".join(
        (
            f"{devices} devices: one interruption every {m / _HOUR:.2f} h (as {record.source})",
            f"save every {tau:.0f} s (stall {stall:g} s), recovery {recovery:g} s",
            f"expected goodput {100 * expected_goodput(m, tau, stall, recovery):.2f} %",
            f"replay of {record.days:g} days: goodput {100 * played.goodput:.2f} %, "
            f"{played.failures} interruptions; lost to "
            + ", ".join(f"{name} {share:.2f} %" for name, share in shares),
        )
    )


def _check(mean_time_between: float, interval: float, stall: float, recovery: float) -> None:
    if mean_time_between <= 0 or interval <= 0 or stall < 0 or recovery < 0:
        raise ShardtrainError(
            f"mean_time_between={mean_time_between} and interval={interval} must be positive, "
            f"stall={stall} and recovery={recovery} not negative (seconds)"
        )
