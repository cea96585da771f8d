"""What happens to the run directory when all processes agree on it: preparing, making room."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from shardtrain.checkpoint import agreement, commit, manifest, steps

Report = Callable[[str], None]


def prepare(directory: Path) -> int | None:
    """Make the directory, check that all processes see it; the newest complete step in it."""
    agreement.on_first(lambda: directory.mkdir(parents=True, exist_ok=True))
    agreement.require_shared(directory)
    newest = max(steps.committed(directory), default=-1)
    newest = agreement.from_first(newest)
    return None if newest < 0 else newest


def sweep(directory: Path) -> None:
    """Remove what killed saves left behind."""
    agreement.on_first(lambda: steps.remove_leftovers(directory))


def make_room(directory: Path, step: int, warn: Report) -> None:
    """Steps from `step` on belong to a future that this run does not have: set them aside."""

    def move() -> None:
        for later in (s for s in steps.present(directory) if s >= step):
            whole = manifest.is_complete(steps.step_path(directory, later))
            moved = steps.set_aside(directory, later, "superseded" if whole else "incomplete")
            warn(f"saving step {step}: the existing step {later} is now {moved.name}")
        steps.require_free(directory, step)
        commit.failure_mark(steps.step_path(directory, step)).unlink(missing_ok=True)

    agreement.on_first(move)


def quarantine(directory: Path, step: int, found: list[str], warn: Report) -> None:
    """Rename a damaged step to `N.corrupt`."""

    def rename() -> None:
        moved = steps.set_aside(directory, step, "corrupt")
        warn(f"checkpoint {step} is damaged ({found[0]}); renamed to {moved.name}")

    agreement.on_first(rename)


def distrust(directory: Path, after: int, warn: Report) -> list[int]:
    """Rename the steps later than `after` to `N.suspect`; those steps, the same everywhere."""
    later = [step for step in steps.present(directory) if step > after]
    agreement.barrier("shardtrain checkpoint listed")

    def rename() -> None:
        for step in later:
            moved = steps.set_aside(directory, step, "suspect")
            warn(f"checkpoint {step} may hold wrong values; renamed to {moved.name}")

    agreement.on_first(rename)
    return later


def drop_failed(directory: Path, step: int) -> None:
    """Free the space of a save that failed: its temporary directory, or its unverified step."""
    if jax.process_index() != 0:
        return
    steps.remove_leftovers(directory)
    commit.failure_mark(steps.step_path(directory, step)).unlink(missing_ok=True)
    partial = not manifest.is_complete(steps.step_path(directory, step))
    if partial and step in steps.present(directory):
        with contextlib.suppress(OSError):  # the failure itself is reported, and says more
            steps.delete(directory, step)


def newest(directory: Path, warn: Report) -> int:
    """The newest complete step that process 0 sees, or -1.

    A newer step without a manifest is left alone: another job may be writing it just now.
    """
    found = max(steps.committed(directory), default=-1)
    if jax.process_index() == 0:
        for step in (s for s in steps.present(directory) if s > found):
            warn(f"step {step} was never completed (no manifest); it is not used")
    return agreement.from_first(found)
