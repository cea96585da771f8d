"""The watch over the loss of a run: which steps are bad, and when to go back.

Design. A batch is `f(seed, step)` and so is a step's random key, so a batch is left out by counting
it as done without doing it: nothing else moves, and the run is, bit for bit, one that never took
that step. A compiled step whose loss or gradient is not finite does the same by itself,
so one such step costs nothing. A spike is seen after its step was taken, and several steps that are
not finite may come from a state that is broken: then the run goes back to the last good state, does
the steps up to the bad one again, exactly as before, and leaves the bad one out.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from shardtrain.errors import UnstableRunError
from shardtrain.monitoring import bad_steps
from shardtrain.monitoring.bad_steps import BadStep
from shardtrain.monitoring.guard import LossGuard, judge
from shardtrain.recovery.saved import SavedStates
from shardtrain.train import TrainState


class LossWatch:
    """Judges every step once and decides when the run has to go back.

    All processes see the same numbers and so decide alike; process 0 writes the record.

    Args:
      guard: The rule; None: every step is good.
      saved: Where the run can go back to.
      directory: Of the run: gets `bad_steps.jsonl`; None: nothing is written.
      seed: Of the run's first state, for the record.
      skip: Steps that are left out from the start, numbered from 1.
      local: Replicas step on their own (`LocalSGD`, `DiLoCo`, `Gossip`): one of them may leave out
        a step that the others take, so the run goes back for each that is not finite.
    """

    def __init__(
        self,
        guard: LossGuard | None,
        saved: SavedStates,
        directory: Path | None,
        seed: int,
        skip: Collection[int] = (),
        local: bool = False,
    ):
        self._on = guard is not None
        self._guard = guard or LossGuard()
        self._saved = saved
        self._directory = directory
        self._seed = seed
        self._local = local
        known = {} if directory is None else bad_steps.read(directory)
        self.skip = {*skip, *known}
        saved.pin(*(bad.replay_from for bad in known.values()))
        self._row: list[int] = []
        self._rollbacks = 0
        self._good_since = 0
        self._went_back_to: int | None = None

    @property
    def uneasy(self) -> bool:
        """Whether the last step was bad: its state is not worth keeping before a good one."""
        return bool(self._row)

    def see(self, step: int, metrics: Mapping[str, float]) -> BadStep | None:
        """Judge a step; call it for every step in order.

        Returns:
          The bad step because of which the run must `go_back`; None if it can go on.
        """
        if not self._on:
            return None
        reason = judge(self._guard, metrics, list(self._saved.losses.values()))
        if reason is None:
            self._good(step, metrics["loss"])
            return None
        anchor = self._saved.anchor(step - 1)
        bad = BadStep(step, reason, metrics["loss"], metrics["grad_norm"], None, anchor, self._seed)
        taken = reason == "spike" or self._local  # at least by some replicas: to be undone
        if taken and not self._saved.can_go_back(step - 1):
            self._say(f"step {step}: {reason} (loss {bad.loss:.4g}); nothing saved to go back to")
            return None
        self.skip.add(step)
        self._record(bad)
        self._good_since = 0
        self._row.append(step)
        if not taken and len(self._row) < self._guard.patience:
            return None
        return bad

    def go_back(self, bad: BadStep) -> TrainState:
        """The state to go on from.

        Raises:
          UnstableRunError: The run went back as often as it may, or there is nothing to go back to.
        """
        first, self._row = self._row[0], []
        self._rollbacks += 1
        if self._rollbacks > self._guard.max_rollbacks:
            raise UnstableRunError(
                f"{bad}. The run went back {self._guard.max_rollbacks} times and found no "
                f"{self._guard.window} good steps in a row since. {self._advice(bad)}"
            )
        state = self._saved.go_back(first - 1, self._went_back_to)
        if state is None:
            raise UnstableRunError(
                f"{bad}. There is no good state to go back to: give st.fit save_every or "
                f"snapshot_every. {self._advice(bad)}"
            )
        self._went_back_to = int(state.step)
        bad = dataclasses.replace(bad, went_back_to=self._went_back_to)
        self._record(bad)
        self._say(str(bad))
        return state

    def _record(self, bad: BadStep) -> None:
        if self._directory is not None and jax.process_index() == 0:
            bad_steps.append(self._directory, bad)

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text)

    def _good(self, step: int, loss: float) -> None:
        self._row = []
        recent = self._saved.losses
        recent[step] = loss
        while len(recent) > self._guard.window:
            del recent[next(iter(recent))]
        self._good_since += 1
        if self._good_since >= self._guard.window:
            self._rollbacks, self._went_back_to = 0, None

    def _advice(self, bad: BadStep) -> str:
        where = self._directory or "RUN_DIR (a run with a directory)"
        return (
            f"`shardtrain replay {where} --step {bad.step}` names the module where it begins; a "
            "lower learning rate or max_grad_norm is the usual remedy"
        )


def skip_step(state: TrainState) -> TrainState:
    """The state after a step that is left out: counted, and nothing else moves."""
    shardings = (state.step.sharding, state.skipped.sharding)
    step, skipped = _counted(shardings)(state.step, state.skipped)
    return state.replace(step=step, skipped=skipped)


@functools.cache
def _counted(shardings: Any) -> Any:
    return jax.jit(lambda step, skipped: (step + 1, skipped + 1), out_shardings=shardings)
