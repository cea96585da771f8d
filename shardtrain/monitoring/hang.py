"""Decide from a table of phases whether a run hangs, and who holds it up.

Design. One time limit for everything kills healthy runs while they compile; a limit per phase does
not. And a process that waits for others is not the culprit: as long as somebody else is busy within
its own limit (compiling, saving), waiting is fine for any length of time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from shardtrain.errors import ShardtrainError, suggest
from shardtrain.monitoring.progress import PHASES

DEFAULT_HANG_TIMEOUTS: Mapping[str, float | None] = MappingProxyType(
    {
        "import": None,  # a script that never calls shardtrain must not be killed
        "dist_init": 330.0,  # a little over the 300 s after which joining gives up by itself
        "setup": 3600.0,
        "restore": 1800.0,
        "first_step": 3600.0,  # compilation
        "data": 300.0,
        "dispatch": 300.0,
        "wait": 300.0,
        "ckpt": 1800.0,
        "eval": 1800.0,
        "done": None,
    }
)
"""Seconds a process may stay in a phase without any report; None is for ever."""

WAITING_PHASES = frozenset({"dist_init", "dispatch", "wait"})


def hang_timeouts(
    overrides: Mapping[str, float | None] | float | None = None,
) -> Mapping[str, float | None]:
    """Complete table of limits in seconds.

    Args:
      overrides: phase → seconds (None: no limit), or one number for data, dispatch and wait.

    Raises:
      ShardtrainError: unknown phase, or a limit that is not positive.
    """
    if overrides is None:
        overrides = {}
    elif not isinstance(overrides, Mapping):
        overrides = dict.fromkeys(("data", "dispatch", "wait"), overrides)
    for phase, seconds in overrides.items():
        if phase not in DEFAULT_HANG_TIMEOUTS:
            known = suggest(phase, DEFAULT_HANG_TIMEOUTS)
            raise ShardtrainError(f"hang timeout for unknown phase {phase!r}: {known}")
        if seconds is not None and seconds <= 0:
            raise ShardtrainError(f"hang timeout of phase {phase!r} is {seconds}: must be > 0")
    return MappingProxyType({**DEFAULT_HANG_TIMEOUTS, **overrides})


@dataclass(frozen=True)
class ProcessStatus:
    """One row of the table: phase and step last reported, and `age` seconds since then.

    `stopped` means that the operating system holds the process (SIGSTOP, a debugger).
    """

    process_index: int
    phase: str
    step: int | None
    age: float
    pid: int
    host: str = "localhost"
    stopped: bool = False


@dataclass(frozen=True)
class Hang:
    """A hang: the whole table and the processes that hold up the others (may be empty)."""

    statuses: tuple[ProcessStatus, ...]
    culprits: tuple[ProcessStatus, ...]


def find_hang(
    statuses: Sequence[ProcessStatus], timeouts: Mapping[str, float | None]
) -> Hang | None:
    """The hang shown by the table, or None while the run is healthy.

    Args:
      statuses: one row per process that has not exited.
      timeouts: limit in seconds per phase, see `hang_timeouts`.
    """
    overdue = [s for s in statuses if _is_overdue(s, timeouts)]
    busy = [s for s in statuses if s not in overdue and s.phase not in WAITING_PHASES]
    busy = [s for s in busy if s.phase != "done" and not s.stopped]
    late_workers = [s for s in overdue if s.phase not in WAITING_PHASES]
    if not overdue or (busy and not late_workers):
        return None
    return Hang(tuple(statuses), _culprits(statuses))


def _is_overdue(status: ProcessStatus, timeouts: Mapping[str, float | None]) -> bool:
    limit = timeouts[status.phase]
    return limit is not None and status.age > limit


def _culprits(statuses: Sequence[ProcessStatus]) -> tuple[ProcessStatus, ...]:
    """Held by the operating system, else not waiting, else behind in steps, else nobody."""
    stopped = tuple(s for s in statuses if s.stopped)
    working = tuple(s for s in statuses if s.phase not in WAITING_PHASES and s.phase != "done")
    lowest = min((s.step for s in statuses if s.step is not None), default=None)
    behind = tuple(s for s in statuses if s.step == lowest)
    if stopped or working:
        return stopped or working
    return behind if len(behind) < len(statuses) else ()


def describe_hang(hang: Hang, stacks: str | None = None) -> str:
    """The hang in sentences: how long, who waits, who is behind and in which phase.

    Args:
      hang: what `find_hang` returned.
      stacks: where the stacks of all threads were written.

    Example:
      >>> print(describe_hang(Hang((w := ProcessStatus(0, "wait", 812, 300.0, 11),), (w,))))
      No progress for 300 s at step 812. Process 0 (pid 11 on localhost) last reported step 812, \
phase 'wait' (waiting for the device).
    """
    others = [s for s in hang.statuses if s not in hang.culprits]
    steps = [s.step for s in hang.statuses if s.step is not None]
    at_step = f" at step {max(steps)}" if steps else ""
    sentences = [f"No progress for {max(s.age for s in hang.statuses):.0f} s{at_step}."]
    for phase in dict.fromkeys(s.phase for s in others):
        who = name_processes([s.process_index for s in others if s.phase == phase])
        sentences.append(f"{who} in phase '{phase}' ({PHASES[phase]}).")
    sentences += [_last_report(status) for status in hang.culprits]
    if not hang.culprits and len(hang.statuses) > 1:
        sentences.append(
            "No process is behind: a collective does not complete, because the processes run "
            "different programs or the network is down."
        )
    if stacks is not None:
        sentences.append(f"Stacks of all threads: {stacks}.")
    return " ".join(sentences)


def describe_lost(hang: Hang, stacks: str) -> str:
    """The same for processes that are still there after all others lost contact and left."""
    lost = " ".join(_last_report(status) for status in hang.statuses)
    return f"The other processes lost contact and left. {lost} Stacks of all threads: {stacks}."


def _last_report(status: ProcessStatus) -> str:
    step = "no step yet" if status.step is None else f"step {status.step}"
    held = ", and is stopped by a signal or debugger" if status.stopped else ""
    return (
        f"Process {status.process_index} (pid {status.pid} on {status.host}) last reported "
        f"{step}, phase '{status.phase}' ({PHASES[status.phase]}){held}."
    )


def name_processes(indices: Sequence[int]) -> str:
    """'Process 3 is' or 'Processes 0, 1 and 3 are'."""
    if len(indices) == 1:
        return f"Process {indices[0]} is"
    listed = ", ".join(str(i) for i in indices[:-1])
    return f"Processes {listed} and {indices[-1]} are"
