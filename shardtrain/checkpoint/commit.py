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


def finish(
    handle: store.PendingSave,
    path: Path,
    header: Header,
    hashes: Mapping[str, Any],
    timeout: float,
) -> int | None:
    """Wait for the commit, then write this process's part of the manifest.

    A failure here, of any kind, ends the waiting of the other processes too.

    Args:
        handle: the save in flight.
        path: the step directory it makes.
        header: process 0 adds the fingerprints and writes it.
        hashes: of every leaf, perhaps still on the device.
        timeout: seconds that process 0 waits for the parts of the others.

    Returns:
        On process 0, once the manifest is complete: the bytes of the step. Else None.
    """
    try:
        return _finish(handle, path, header, hashes, timeout)
    except BaseException:
        with contextlib.suppress(OSError):  # the failure itself says more
            failure_mark(path).touch()
        raise


def failure_mark(path: Path) -> Path:
    """The file that says that some process could not save its part of the step."""
    return path.with_name(f"{path.name}.failed")


def _finish(
    handle: store.PendingSave,
    path: Path,
    header: Header,
    hashes: Mapping[str, Any],
    timeout: float,
) -> int | None:
    _result(handle, path)
    first = jax.process_index() == 0
    if first:
        filled = dataclasses.replace(header, fingerprints=as_text(hashes))
        manifest.write_header(path, filled)
    manifest.write_part(path, jax.process_index(), header.num_parts)
    if not first:
        return None
    _wait_for_parts(path, header.num_parts, timeout)
    return manifest.total_bytes(path)


def _wait_for_parts(path: Path, num_parts: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not manifest.is_complete(path, num_parts):
        _raise_if_marked(path)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {num_parts} processes confirmed {path}")
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
