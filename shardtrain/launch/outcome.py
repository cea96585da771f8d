"""What a generation of processes came to, and what to do next. Pure: no processes here."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardtrain.launch.worker import EXIT_LOCAL_ERROR, EXIT_PEER_FAILURE, EXIT_PREEMPTED
from shardtrain.monitoring.watchdog import WATCHDOG_EXIT_CODE

_FOLLOWERS = (EXIT_PEER_FAILURE, -signal.SIGABRT)
"""Codes of processes that end because another one did: so told, or aborted by the runtime."""


@dataclass(frozen=True)
class Exit:
    """One process ended: its code (negative: signal), the phase and step it was in, and when.

    `time` is the Unix time at which we saw it.
    """

    process_index: int
    code: int
    phase: str
    step: int | None
    time: float = 0.0

    @property
    def kind(self) -> str:
        """'done', 'preempted', 'peer', 'watchdog', 'signal' or 'local'."""
        if self.code in _FOLLOWERS:
            return "peer"
        names = {0: "done", EXIT_PREEMPTED: "preempted", WATCHDOG_EXIT_CODE: "watchdog"}
        return names.get(self.code, "signal" if self.code < 0 else "local")

    def __str__(self) -> str:
        how = f"exit code {self.code}"
        if self.code < 0:
            how = f"killed by {signal.Signals(-self.code).name}"
        where = "" if self.step is None else f" at step {self.step}"
        return f"process {self.process_index} failed{where}, phase '{self.phase}' ({how})"


@dataclass(frozen=True)
class Generation:
    """One start of all processes, over.

    Attributes:
      process_count: how many there were.
      exits: in the order in which they ended, before we killed the rest.
      step: furthest step any process reported.
      hang: the sentence about a hang that we ended, or None.
      hang_process: the culprit, if one was found.
      stop_signal: the signal that asked us to stop, or None.
    """

    process_count: int
    exits: tuple[Exit, ...]
    step: int | None = None
    hang: str | None = None
    hang_process: int | None = None
    stop_signal: int | None = None

    @property
    def root(self) -> Exit | None:
        """The first process that failed by itself, else the first that failed."""
        failed = [e for e in self.exits if e.kind not in ("done", "preempted")]
        return next((e for e in failed if e.kind != "peer"), failed[0] if failed else None)

    @property
    def result(self) -> str:
        """'done', 'preempted', 'stopped' or 'failed'."""
        kinds = {e.kind for e in self.exits}
        complete = len(self.exits) == self.process_count
        if complete and kinds == {"done"}:
            return "done"
        # Code 42 says that all processes agreed and saved, whatever tore down the others later.
        if complete and "preempted" in kinds and kinds <= {"done", "preempted", "peer"}:
            return "preempted"
        return "failed" if self.stop_signal is None else "stopped"

    @property
    def culprit(self) -> int | None:
        """Index of the process to blame."""
        if self.hang is not None:
            return self.hang_process
        return None if self.root is None else self.root.process_index


@dataclass(frozen=True)
class Stop:
    """Do not start again; leave with `code`."""

    code: int
    reason: str


@dataclass(frozen=True)
class Restart:
    """Start `process_count` processes from the last saved step."""

    process_count: int
    reason: str


def next_action(
    history: Sequence[Generation], *, max_restarts: int, shrink_to: Sequence[int] = ()
) -> Stop | Restart:
    """Decide after a generation has ended.

    Args:
      history: all generations so far, at least one.
      max_restarts: restarts without progress before giving up; progress refills the budget.
      shrink_to: smaller process counts that the run also works with.
    """
    last = history[-1]
    if last.result in ("done", "preempted", "stopped"):
        return Stop(_code(last), last.result)
    smaller = max((n for n in shrink_to if n < last.process_count), default=None)
    if _repeats_local_error(history):
        # A size that never worked is no proof against a smaller one that was declared.
        if _never_started_at_this_size(history) and smaller is not None:
            return Restart(smaller, f"{last.process_count} processes do not start")
        where = "before the first step" if last.step is None else f"at step {last.step}"
        return Stop(_code(last), f"the same error twice {where}: starting again cannot help")
    left = _budget(history, max_restarts)
    if left == 0:
        return Stop(_code(last), f"{max_restarts} restarts without progress")
    used = f"restart {max_restarts - left + 1} of {max_restarts} without progress"
    if smaller is not None and _does_not_come_back(history):
        return Restart(smaller, f"process {last.culprit} does not come back; {used}")
    return Restart(last.process_count, used)


def _code(generation: Generation) -> int:
    if generation.result in ("done", "preempted"):
        return EXIT_PREEMPTED if generation.result == "preempted" else 0
    if generation.stop_signal is not None:
        return 128 + generation.stop_signal
    if generation.hang is not None:
        return WATCHDOG_EXIT_CODE
    code = EXIT_LOCAL_ERROR if generation.root is None else generation.root.code
    return code if code > 0 else 128 - code


def _is_local(generation: Generation) -> bool:
    return (
        generation.hang is None and (root := generation.root) is not None and root.kind == "local"
    )


def _repeats_local_error(history: Sequence[Generation]) -> bool:
    if _never_started_at_this_size(history):
        return True
    if len(history) < 2 or not (_is_local(history[-1]) and _is_local(history[-2])):
        return False
    last, before = history[-1].root, history[-2].root
    return last is not None and before is not None and last.step == before.step


def _never_started_at_this_size(history: Sequence[Generation]) -> bool:
    """A just reduced number of processes failed by a local error before its first step."""
    if len(history) < 2 or not _is_local(history[-1]):
        return False
    shrunk = history[-1].process_count < history[-2].process_count
    return shrunk and history[-1].step is None


def _made_progress(history: Sequence[Generation]) -> Sequence[bool]:
    best, progress = -1, []
    for generation in history:
        step = -1 if generation.step is None else generation.step
        progress.append(step > best)
        best = max(best, step)
    return progress


def _budget(history: Sequence[Generation], max_restarts: int) -> int:
    """Restarts left: full after progress, less one for each restart since."""
    left = max_restarts
    for number, progress in enumerate(_made_progress(history)):
        if number > 0:
            left -= 1
        if progress:
            left = max_restarts
    return left


def _does_not_come_back(history: Sequence[Generation]) -> bool:
    if len(history) < 2 or history[-1].culprit is None or _made_progress(history)[-1]:
        return False
    return history[-1].culprit == history[-2].culprit


def describe_exit(exit_: Exit, report: Mapping[str, object] | None, host: str) -> str:
    """One failed process in one sentence, with the error's own words if it left a report."""
    text = f"{exit_} on {host}"
    if report is not None:
        text += f": {report['type']}: {report['message']}"
    return text
