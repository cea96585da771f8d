"""Devices to compile for that are not here.

XLA's TPU and GPU compilers run without the hardware, given a description of it. A mesh made of the
devices of a `Target` can be lowered and compiled as usual, in this process; nothing is allocated
and nothing can be run. In-process, because a plan closes over Python functions that no other
process has: lowering must happen here, and then compiling here is the simplest. What needs another
process (more CPU devices than this one has) goes through `shardtrain.planner.remote`.

TPU: the `libtpu` package (extra `tpu`). GPU: JAX's CUDA plugin (extra `cuda`); no driver is needed.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from shardtrain.errors import HardwareError
from shardtrain.hardware import Hardware, hardware
from shardtrain.planner.gpu_targets import TARGETS, target_config

# Read by libtpu and the CUDA plugin while they load: no TPU metadata server is asked, a lock that
# another process holds does not matter (no device is opened), a missing GPU driver is no error.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
_TPU_HOST = {2: (2, 2, 1), 3: (2, 2, 1)}  # chips of one host along x, y, z


@dataclass(frozen=True)
class Target:
    """Devices one can compile for.

    Attributes:
        hardware: what was asked for.
        devices: JAX devices for a mesh; empty when none can be had in this process.
        platform: `tpu`, `gpu` or `cpu`.
        is_proxy: the devices are not of the kind asked for.
        note: one sentence: what the compiled program is, and is not.
    """

    hardware: Hardware
    devices: tuple[Any, ...]
    platform: str
    is_proxy: bool
    note: str


@contextlib.contextmanager
def compiler_environment() -> Generator[None]:
    """The variables the deviceless compilers need, for as long as they load; none is overwritten.

    On a machine with a TPU nothing is set: its own variables are the right ones. JAX is started
    first, so that it finds the devices it would have found anyway.
    """
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    if jax.default_backend() != "tpu":
        for name, value in _ENVIRONMENT.items():
            # Where JAX looked for a TPU and found none, it left a text that begins so.
            if (before[name] or "WARNING").startswith("WARNING"):
                os.environ[name] = value
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _tpu_devices(asked: Hardware) -> list[Any]:
    """Devices of a TPU slice, from libtpu."""
    shape = asked.topology
    options: dict[str, Any] = {}
    host = _TPU_HOST[asked.chip.torus]
    if any(size % per_host for size, per_host in zip(shape, host, strict=False)):
        # Smaller than a host, or not made of whole ones: describe it as hosts of one chip.
        whole = math.prod(shape) <= asked.chip.chips_per_host
        padded = (*shape, 1, 1)[:3]
        options["chips_per_host_bounds"] = padded if whole else (1, 1, 1)
    if asked.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as Cloud TPU v4 shows
    name = f"{asked.chip.name}:{'x'.join(map(str, shape))}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


def _gpu_devices(asked: Hardware) -> list[Any]:
    """Devices of GPU hosts, from the CUDA plugin: slices x hosts x GPUs of a host."""
    hosts, per_host = asked.topology
    found = topologies.get_topology_desc(
        f"{hosts}x{per_host}x1",
        "cuda",
        target_config=target_config(asked.chip.name),
        topology=f"1x{hosts}x{per_host}",
    )
    return list(found.devices)


def compiler_for(asked: Hardware) -> tuple[str, str]:
    """`(platform, reason)`: what would compile for this hardware, and why it is not its own."""
    reason = _missing(asked)
    return ("cpu", reason) if reason else (asked.chip.kind, "")


def _missing(asked: Hardware) -> str:
    """Why the real compiler cannot be used here; "" when it seems to be installed."""
    kind = asked.chip.kind
    if kind == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (pip install 'shardtrain[tpu]')"
    if kind == "gpu" and asked.chip.name not in TARGETS:
        return f"XLA's compiler has no description of {asked.chip.name}"
    if kind == "gpu" and not any(
        importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")
    ):
        return "JAX's CUDA plugin is not installed (pip install 'shardtrain[cuda]')"
    return ""


def _proxy(asked: Hardware, reason: str) -> Target:
    """CPU devices in place of those asked for."""
    count = asked.device_count
    here = jax.local_devices(backend="cpu")
    note = f"compiled for CPU, not {asked}"
    if reason:
        note += f" ({reason})"
    note += ": bf16 is communicated as f32, reduce-scatter shows as all-reduce, memory differs"
    return Target(asked, tuple(here[:count]) if len(here) >= count else (), "cpu", True, note)


def target_devices(spec: str | Hardware) -> Target:
    """Devices to compile for: the real compiler's if it is installed, else the CPU's, saying so.

    Args:
        spec: hardware as in `shardtrain.hardware`: `"h100:8x8"`, `"v5e:4x4"`, `"cpu:8"`.

    Returns:
        A target; `devices` is empty when only CPU devices would do and this process has too few.

    Raises:
        HardwareError: the hardware is not known, or its compiler refuses the topology.
    """
    asked = hardware(spec)
    if asked.chip.kind == "cpu":
        here = jax.local_devices(backend="cpu")
        fits = len(here) >= asked.device_count
        devices = tuple(here[: asked.device_count]) if fits else ()
        return Target(
            asked, devices, "cpu", False, f"compiled for {asked.device_count} CPU devices"
        )
    _, reason = compiler_for(asked)
    if reason:
        return _proxy(asked, reason)
    make = _tpu_devices if asked.chip.kind == "tpu" else _gpu_devices
    try:
        with compiler_environment():
            devices = make(asked)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" in str(error):
            raise HardwareError(f"{asked}: the compiler refuses this topology: {error}") from error
        return _proxy(asked, f"its compiler did not start ({_first_line(error)})")
    except NotImplementedError:
        # JAX looks for plugins once, when it starts, and drops a CUDA plugin without a driver.
        return _proxy(asked, "JAX dropped its plugin when it started; set JAX_PLATFORMS=cpu before")
    except RuntimeError as error:
        return _proxy(asked, f"its compiler did not start ({_first_line(error)})")
    if len(devices) != asked.device_count:
        raise HardwareError(
            f"{asked} should have {asked.device_count} devices, its compiler says {len(devices)}"
        )
    note = f"compiled by XLA's {asked.chip.kind.upper()} compiler for {asked}, without the hardware"
    if asked.chip.kind == "gpu":
        note += "; without autotuning, and library workspaces are not in its memory"
    return Target(asked, tuple(devices), asked.chip.kind, False, note)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
