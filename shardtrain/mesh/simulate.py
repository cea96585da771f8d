"""Virtual CPU devices, before or after JAX has started."""

import os
from typing import Any

import jax

from shardtrain import compat
from shardtrain.errors import SimulationError

# A device waits in at most one collective per loop that runs, and in one beside them.
_THREADS_PER_DEVICE = 8
_FEWEST_PER_DEVICE = 4


def simulate(num_devices: int, reset: bool = False) -> list[jax.Device]:
    """Make this process see `num_devices` CPU devices.

    Proves shapes, shardings, numerics, checkpoints and data order on a laptop; not speed or
    device memory.

    Args:
      num_devices: How many devices JAX should show.
      reset: If JAX already started with fewer, drop all live arrays and compiled functions and
        start the CPU backend again.

    Returns:
      The devices.

    Raises:
      SimulationError: JAX already started with fewer devices and `reset` is False.

    Example:
      >>> import shardtrain as st
      >>> len(st.simulate(8))
      8
    """
    if isinstance(num_devices, bool) or not isinstance(num_devices, int) or num_devices < 1:
        raise SimulationError(f"simulate({num_devices!r}): give a whole number of devices >= 1")
    if not compat.backends_started():
        return _start(num_devices)
    devices = jax.devices()
    if devices[0].platform == "cpu" and len(devices) == num_devices:
        return devices
    if devices[0].platform == "cpu" and len(devices) > num_devices and not reset:
        return devices[:num_devices]
    if not reset:
        raise SimulationError(_too_late(num_devices, devices))
    compat.clear_backends()
    return _start(num_devices)


def _start(num_devices: int) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    # XLA sizes its CPU thread pool by this, or by the cores. A waiting collective keeps its thread,
    # and one device may wait in several (in a loop, and behind it): with as many threads as
    # devices, those that still have to arrive may find none.
    threads = max(int(os.environ.get("NPROC") or 0), _THREADS_PER_DEVICE * num_devices)
    os.environ["NPROC"] = str(threads)
    devices = jax.devices()
    if len(devices) != num_devices:
        raise SimulationError(
            f"asked JAX for {num_devices} CPU devices and got {len(devices)}: something else "
            "configures them (look for JAX_NUM_CPU_DEVICES or XLA_FLAGS in the environment)"
        )
    return devices


def few_threads(mesh: Any) -> str:
    """What to know about CPU devices that were not made by `simulate`; "" where all is well.

    Args:
      mesh: The mesh of a plan; may be abstract.
    """
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return ""
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    threads = max(int(os.environ.get("NPROC") or os.cpu_count() or 1), len(local))
    if len(local) < 2 or local[0].platform != "cpu" or threads >= _FEWEST_PER_DEVICE * len(local):
        return ""
    return (
        f"{len(local)} CPU devices share {threads} XLA threads: collectives can wait for each "
        f"other for ever (XLA aborts after 40 s). Make the devices with st.simulate({len(local)}), "
        f"or set NPROC={_THREADS_PER_DEVICE * len(local)} before JAX starts"
    )


def _too_late(num_devices: int, devices: list[jax.Device]) -> str:
    kind = f"{len(devices)} {devices[0].platform.upper()} device{'s' * (len(devices) != 1)}"
    late_flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    note = (
        " XLA_FLAGS asks for more host devices, but it was set after JAX started and has no effect."
        if late_flag
        else ""
    )
    return (
        f"JAX already started with {kind}, so it cannot show {num_devices}.{note} Restart the "
        f"kernel and run st.simulate({num_devices}) before any JAX call, or call "
        f"st.simulate({num_devices}, reset=True) to drop all live arrays and compiled functions "
        "and restart the CPU backend now."
    )
