"""The second half of a save, in the background: commit, read back, record."""

import dataclasses
import platform
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

    Args:
        handle: the save in flight.
        path: the step directory it makes.
        header: process 0 adds the fingerprints and writes it.
        hashes: of every leaf, perhaps still on the device.
        timeout: seconds that process 0 waits for the parts of the others.

    Returns:
        On process 0, once the manifest is complete: the bytes of the step. Else None.
    """
    handle.result()
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
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {num_parts} processes confirmed {path}")
        time.sleep(0.02)
