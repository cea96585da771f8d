"""Decisions that all processes must take alike; each is trivial with one process."""

import secrets
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from shardtrain.errors import CheckpointError


def all_agree(verdict: bool) -> bool:
    """Whether every process says yes."""
    if jax.process_count() == 1:
        return verdict
    return bool(np.all(multihost_utils.process_allgather(np.int32(verdict))))


def from_first(value: int) -> int:
    """The value that process 0 has."""
    if jax.process_count() == 1:
        return value
    halves = np.array([value], np.int64).view(np.int32)  # jax would cut 64 bits to 32
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(halves))
    return int(agreed.view(np.int64)[0])


def on_first(action: Callable[[], object]) -> None:
    """Run `action` on process 0 while the others wait; all raise when it fails.

    Raises:
        CheckpointError: what went wrong on process 0.
    """
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            action()
        except (OSError, CheckpointError) as error:
            failure = error
    if all_agree(failure is None):
        return
    if isinstance(failure, CheckpointError):
        raise failure
    raise CheckpointError(f"process 0 could not prepare the directory: {failure}") from failure


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def require_shared(directory: Path) -> None:
    """Check that all processes see one directory: process 0 leaves a token, all look for it.

    Raises:
        CheckpointError: names the processes that cannot see it.
    """
    if jax.process_count() == 1:
        return
    token = directory / f".shared-{from_first(secrets.randbits(31)):x}"
    if jax.process_index() == 0:
        token.touch()
    barrier("shardtrain checkpoint token")
    seen = np.atleast_1d(multihost_utils.process_allgather(np.int32(token.exists())))
    if jax.process_index() == 0:
        token.unlink()
    blind = np.flatnonzero(seen == 0).tolist()
    if blind:
        raise CheckpointError(
            f"{directory} is not shared: processes {blind} cannot see what process 0 wrote there. "
            "Choose a directory that all hosts mount."
        )
