"""Short texts about meshes and sizes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def mesh_of(abstract: Any) -> dict[str, Any]:
    """Axis sizes, devices and processes of the mesh that a tree lies on."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(abstract))
    named = [s for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    axes = dict(named[0].mesh.shape) if named else {}
    devices = int(np.prod(list(axes.values()), dtype=np.int64)) if axes else 1
    return {"axes": axes, "devices": devices, "processes": jax.process_count()}


def describe_mesh(mesh: Mapping[str, Any]) -> str:
    """`data=2,tensor=4 (8 devices)`."""
    axes = ",".join(f"{axis}={size}" for axis, size in mesh["axes"].items() if size > 1)
    devices = mesh["devices"]
    counted = f"{devices} device{'s' if devices > 1 else ''}"
    return f"{axes} ({counted})" if axes else counted


def human_bytes(count: float) -> str:
    """`1.2 GB`; units of 1000."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def reason(error: BaseException) -> str:
    """What went wrong, in words a user can act on."""
    text = str(error)
    if "No space left" in text or "File too large" in text:
        return f"the disk is full or a size limit was reached ({text[:200]})"
    return f"{type(error).__name__}: {text[:500]}"
