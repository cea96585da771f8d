"""Where a run can come back to: checkpoints on disk, snapshots in memory.

Snapshots lie in `/dev/shm`, in a folder that only this user can read and whose name comes from a
token in the run directory: a run that starts anew in an emptied directory does not meet the
snapshots of the old one, and a restarted process finds its own.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from shardtrain.checkpoint import Checkpointer, MemorySnapshot
from shardtrain.checkpoint.agreement import from_first, on_first
from shardtrain.data import DataLoader
from shardtrain.errors import CheckpointError
from shardtrain.plan import Plan
from shardtrain.train import TrainState

_TOKEN = "run-id"
_MEMORY = Path("/dev/shm")
_SNAPSHOTS_KEPT = 3

Losses = Mapping[int, float]
"""Step -> loss of the last good steps: a resumed run judges spikes by the same ones."""


class SavedStates:
    """The checkpoints and snapshots of one run of `st.fit`; a context manager.

    All processes call every method together.

    Args:
      path: The run directory; None: there are no checkpoints.
      plan: What is trained.
      loader: Its position is the step; its settings are compared when resuming.
      max_to_keep: Checkpoints kept.
      in_memory: Whether to take snapshots too.
    """

    def __init__(
        self,
        path: Path | None,
        plan: Plan,
        loader: DataLoader,
        max_to_keep: int | None = 3,
        in_memory: bool = False,
    ):
        self._loader = loader
        self.losses: dict[int, float] = {}
        self._disk = None if path is None else Checkpointer(path, plan, max_to_keep=max_to_keep)
        self._memory = (
            MemorySnapshot(_folder(path), plan, keep=_SNAPSHOTS_KEPT) if in_memory else None
        )

    def __enter__(self) -> "SavedStates":
        if self._disk is not None:
            self._disk.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Waits for what is being saved; after an error, not for the other processes."""
        if self._disk is not None:
            self._disk.__exit__(kind, error, traceback)
        if self._memory is not None and (error is None or self._disk is None):
            self._memory.delete()
            with contextlib.suppress(OSError):  # another process of this host still has its own
                self._memory.directory.parent.rmdir()

    def resume(self, make: Callable[[], TrainState]) -> tuple[TrainState, str]:
        """The newest good state, else a new one; and a sentence when it was restored."""
        found = self._newest()
        if found is None:
            return make(), ""
        state, where = found
        step = int(state.step)
        example = step * self._loader.global_batch_size
        return state, (
            f"resumed at step {step}{where}: next example "
            f"{example % self._loader.examples_per_epoch} of epoch {self._loader.epoch(step)}, "
            "same as the uninterrupted run"
        )

    def _newest(self) -> tuple[TrainState, str] | None:
        on_disk = None if self._disk is None else self._disk.latest()
        on_disk = from_first(-1 if on_disk is None else on_disk)
        for step in reversed(self._snapshots()):
            if step > on_disk and (state := self._restore_snapshot(step)) is not None:
                return state, " (from memory)"
        if self._disk is None or on_disk < 0:
            return None
        state = self._disk.restore()
        self._read_extra(self._disk.extra)
        return state, ""

    def save(self, state: TrainState) -> None:
        """Start to save; returns when the state is copied."""
        if self._disk is not None:
            self._disk.save(state, extra=self._extra())

    def snapshot(self, state: TrainState) -> None:
        """Copy the state to memory; a snapshot that does not fit is reported, and is the last."""
        if self._memory is None:
            return
        try:
            self._memory.save(state, extra=self._extra())
        except CheckpointError as error:
            print(f"process {jax.process_index()}: {error} Snapshots end here.")
            self._memory.delete()
            self._memory = None

    def can_go_back(self, before: int) -> bool:
        """Whether a state of at most step `before` is saved."""
        oldest = min(self._sources(), default=before + 1)
        return from_first(oldest) <= before

    def _sources(self) -> list[int]:
        on_disk = [] if self._disk is None else self._disk.steps()
        return sorted({*on_disk, *self._snapshots()})

    def go_back(self, before: int, earlier_than: int | None = None) -> TrainState | None:
        """The newest good state of at most step `before`; None if there is none.

        Args:
          before: The state must not have seen a later step.
          earlier_than: Prefer a state from before this step: the last one did not help.
        """
        if self._disk is not None:
            self._disk.wait()
        usable = [step for step in self._sources() if step <= before]
        older = [step for step in usable if earlier_than is not None and step < earlier_than]
        for step in reversed(older or usable):
            if (state := self._restore_snapshot(step)) is not None:
                return state
            if (state := self._restore_checkpoint(step)) is not None:
                return state
        return None

    def anchor(self, before: int) -> int:
        """The newest checkpoint of at most step `before`, 0 for none; it is kept from now on."""
        if self._disk is None:
            return 0
        self._disk.wait()
        found = from_first(max((s for s in self._disk.steps() if s <= before), default=0))
        self.pin(found)
        return found

    def pin(self, *steps: int) -> None:
        """Keep these checkpoints whatever `max_to_keep` says."""
        if self._disk is not None:
            self._disk.pinned = self._disk.pinned | set(steps)

    def distrust(self, after: int) -> list[int]:
        """Set aside all that was saved after step `after`; the checkpoints concerned."""
        if self._memory is not None:
            self._memory.forget_after(after)
        return [] if self._disk is None else self._disk.distrust(after)

    def poll(self) -> None:
        """Raise at once if a save in the background has failed."""
        if self._disk is not None:
            self._disk.poll()

    def wait(self) -> None:
        """Until everything is committed."""
        if self._disk is not None:
            self._disk.wait()

    def _snapshots(self) -> list[int]:
        return [] if self._memory is None else self._memory.steps()

    def _restore_snapshot(self, step: int) -> TrainState | None:
        if self._memory is None or step not in self._memory.steps():
            return None
        try:
            state = self._memory.restore(step)
        except CheckpointError:
            return None
        self._read_extra(self._memory.extra)
        return state

    def _restore_checkpoint(self, step: int) -> TrainState | None:
        if self._disk is None or step not in self._disk.steps():
            return None
        try:
            state = self._disk.restore(step)
        except CheckpointError:
            return None
        self._read_extra(self._disk.extra)
        return state

    def _extra(self) -> dict[str, Any]:
        losses = {str(step): loss for step, loss in self.losses.items()}
        return {"data": self._loader.describe(), "losses": losses}

    def _read_extra(self, extra: Mapping[str, Any]) -> None:
        self._loader.check_resume(extra.get("data", {}))
        self.losses = {int(step): loss for step, loss in extra.get("losses", {}).items()}


def has_snapshots(directory: Path) -> bool:
    """Whether a run in this directory left snapshots in this host's memory; nothing is made."""
    path = directory.expanduser().resolve()
    token = path / _TOKEN
    if not token.is_file():
        return False
    return any(_place(_token_text(path)).glob("process-*/[0-9]*"))


def _folder(path: Path | None) -> Path:
    """The folder of a run's snapshots on this host, readable by this user only.

    Raises:
      CheckpointError: Somebody else made it.
    """
    folder = _place(_run_id(path))
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise CheckpointError(f"{folder} belongs to another user; snapshots are not kept there.")
    return folder


def _place(run_id: str) -> Path:
    name = hashlib.sha256(run_id.encode()).hexdigest()[:16]
    root = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    return root / f"shardtrain-{os.getuid()}-{name}"


def _run_id(path: Path | None) -> str:
    """A token that process 0 leaves in the run directory; without one, of this run only."""
    if path is None:
        return f"{from_first(secrets.randbits(60))}"
    token = path / _TOKEN

    def make() -> None:
        path.mkdir(parents=True, exist_ok=True)
        if not token.exists():
            token.write_text(secrets.token_hex(16), "ascii")

    on_first(make)
    return _token_text(path)


def _token_text(path: Path) -> str:
    return f"{path} {(path / _TOKEN).read_text('ascii')}"
