"""The second half of a save, in the background: commit, read back, record.

Design: Orbax lets a process that could write its part wait for one that could not until a time-out.
So the one that fails leaves an empty file, `N.failed`, and the others look for it while they wait.
What they abandon is a thread that waits at a barrier nobody else will reach; it does nothing more.
"""

import concurrent.futures
import contextlib
import dataclasses
import platform
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from shardtrain.checkpoint import manifest, store
from shardtrain.checkpoint.describe import mesh_of
from shardtrain.checkpoint.fingerprint import as_text
from shardtrain.checkpoint.header import Header
from shardtrain.checkpoint.leaves import LeafInfo

_LOOK_EVERY = 0.1  # seconds
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Save:
    """A save in flight: its arrays are on the host, and Orbax is writing them.

    Args:
        handle: to wait for.
        path: the step directory it makes.
        header: process 0 adds the fingerprints and writes it.
        hashes: of every leaf, perhaps still on the device.
        timeout: seconds that process 0 waits for the parts of the others.
    """

    handle: store.PendingSave
    path: Path
    header: Header
    hashes: Mapping[str, Any]
    timeout: float


def header_of(
    step: int,
    infos: Mapping[str, LeafInfo],
    abstract: Any,
    plan: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Header:
    """The description of a step, but for the fingerprints, which are still being computed."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return Header(
        step=step,
        leaves=dict(infos),
        fingerprints={},
        plan=dict(plan),
        mesh=mesh_of(abstract),
        extra=dict(extra),
        versions=versions | {"python": platform.python_version()},
        num_parts=jax.process_count(),
    )


def finish(save: Save) -> int | None:
    """Wait for the commit, then write this process's part of the manifest.

    A failure here, of any kind, ends the waiting of the other processes too.

    Returns:
        On process 0, once the manifest is complete: the bytes of the step. Else None.
    """
    try:
        return _finish(save)
    except BaseException:
        with contextlib.suppress(OSError):  # the failure itself says more
            failure_mark(save.path).touch()
        raise


def failure_mark(path: Path) -> Path:
    """The file that says that some process could not save its part of the step."""
    return path.with_name(f"{path.name}.failed")


def _finish(save: Save) -> int | None:
    _result(save.handle, save.path)
    first = jax.process_index() == 0
    if first:
        filled = dataclasses.replace(save.header, fingerprints=as_text(save.hashes))
        manifest.write_header(save.path, filled)
    manifest.write_part(save.path, jax.process_index(), save.header.num_parts)
    if not first:
        return None
    _wait_for_parts(save)
    return manifest.total_bytes(save.path)


def _wait_for_parts(save: Save) -> None:
    deadline, num_parts = time.monotonic() + save.timeout, save.header.num_parts
    while not manifest.is_complete(save.path, num_parts):
        _raise_if_marked(save.path)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {num_parts} processes confirmed {save.path}")
        time.sleep(0.02)


def _result(handle: store.PendingSave, path: Path) -> None:
    """Wait for the arrays, but not longer than all processes are well."""
    if jax.process_count() == 1:
        handle.result()
        return
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def wait() -> None:
        try:
            future.set_result(handle.result())
        except BaseException as error:  # noqa: BLE001  (handed on, not swallowed)
            future.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()  # daemon: it may be abandoned
    while not concurrent.futures.wait([future], timeout=_LOOK_EVERY).done:
        _raise_if_marked(path)
    future.result()


def _raise_if_marked(path: Path) -> None:
    if failure_mark(path).exists():
        raise OSError("another process could not save its part")
