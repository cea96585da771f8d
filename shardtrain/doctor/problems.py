"""Versions, and what is wrong or slow about this installation, in sentences with a remedy."""

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu",
            "jax-cuda12-plugin", "jax-cuda13-plugin")  # fmt: skip
OLDEST_JAX = (0, 10)


def versions() -> dict[str, str]:
    """Package -> version, of those installed; and Python's."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def problems(
    found: Mapping[str, str],
    devices: Sequence[Any],
    directory: str | Path,
    environment: Mapping[str, str] = os.environ,
    has_gpu_driver: bool | None = None,
) -> list[str]:
    """What is wrong, each with what to do.

    Args:
        found: `versions()`.
        devices: JAX's devices.
        directory: where runs are saved.
        environment: environment variables.
        has_gpu_driver: whether `nvidia-smi` is there; None: look.
    """
    told = []
    if _version(found["jax"]) < OLDEST_JAX:
        told.append(f"jax {found['jax']} is older than 0.10, which shardtrain needs: "
                    "pip install -U jax")  # fmt: skip
    if found["jax"].rsplit(".", 1)[0] != found["jaxlib"].rsplit(".", 1)[0]:
        told.append(f"jax {found['jax']} and jaxlib {found['jaxlib']} do not belong together: "
                    "pip install -U jax jaxlib")  # fmt: skip
    on_cpu = devices[0].platform == "cpu"
    if has_gpu_driver is None:
        has_gpu_driver = shutil.which("nvidia-smi") is not None
    if on_cpu and has_gpu_driver:
        forced = environment.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={forced} hides it" if forced else "pip install 'shardtrain[cuda]'"
        told.append(f"there is a GPU driver, but JAX sees only CPU devices: {why}")
    flags = environment.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        told.append("XLA_FLAGS forces a number of CPU devices: st.simulate(8) does that without "
                    "restarting, unset it")  # fmt: skip
    if (
        "blocking" in environment.get("CUDA_LAUNCH_BLOCKING", "")
        or environment.get("CUDA_LAUNCH_BLOCKING") == "1"
    ):
        told.append("CUDA_LAUNCH_BLOCKING=1 makes every kernel wait: unset it")
    if not on_cpu and environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() == "false":
        told.append("XLA_PYTHON_CLIENT_PREALLOCATE=false fragments device memory: unset it for "
                    "training")  # fmt: skip
    if environment.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        told.append("JAX_ENABLE_X64 makes 64-bit arrays, which accelerators compute slowly")
    if environment.get("JAX_DEBUG_NANS", "").lower() in ("1", "true"):
        told.append("JAX_DEBUG_NANS runs every operation twice when one is not finite: for "
                    "debugging only")  # fmt: skip
    free = shutil.disk_usage(directory).free
    if free < 10e9:
        told.append(f"{Path(directory).resolve()} has {free / 1e9:.1f} GB free: checkpoints of "
                    "larger models will not fit")  # fmt: skip
    return told


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def host_memory() -> float:
    """Bytes of memory of this host."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """`8 x NVIDIA H100 80GB HBM3` and processes."""
    processes = len({d.process_index for d in devices})
    across = f" in {processes} processes" if processes > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){across}"
