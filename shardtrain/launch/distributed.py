"""`st.init_distributed()`: make this process part of the run, or say in one sentence why not."""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import jaxlib

from shardtrain.compat import backends_started
from shardtrain.errors import DistributedError
from shardtrain.launch.addresses import (
    default_bind_address,
    refuse_loopback,
    require_own_name,
)
from shardtrain.launch.environment import ProcessLayout, detect_layout
from shardtrain.launch.gpus import count_nvidia_devices
from shardtrain.launch.roll_call import roll_call
from shardtrain.launch.worker import SUPERVISOR_VARIABLE, install_excepthook
from shardtrain.monitoring.progress import Progress


def init_distributed(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    *,
    bind_address: str | None = None,
    local_device_ids: Sequence[int] | None = None,
    timeout: float = 300.0,
    heartbeat_timeout: int = 100,
    environ: Mapping[str, str] = os.environ,
    announce: Callable[[str], None] = print,
) -> ProcessLayout:
    """Join the processes of this run. Call it first; calling it again changes nothing.

    Without arguments the environment decides (our launcher, SLURM, Kubernetes JobSet, Open MPI,
    GKE TPU); a single process needs nothing and nothing is done. All processes must call it.

    Args:
      coordinator: "host:port" at which all processes reach process 0.
      process_count, process_index: given together with `coordinator`, or not at all.
      bind_address: "host:port" on which process 0 listens. Default: loopback if all processes are
        known to be on this machine, else the address that `coordinator` resolves to.
      local_device_ids: accelerators of this process; default all visible, or what SLURM and Open
        MPI imply.
      timeout: seconds to wait for all processes.
      heartbeat_timeout: seconds of silence after which JAX gives a process up.
      environ: where to look.
      announce: gets the layout in one sentence, on process 0.

    Returns:
      The layout, also printable.

    Raises:
      DistributedError: JAX has already started, the coordinator cannot be right, a process is
        missing, an index is taken twice, counts or versions differ.

    Example:
      >>> init_distributed(environ={}).process_count
      1
    """
    layout = _layout(coordinator, process_count, process_index, local_device_ids, environ)
    if jax.distributed.is_initialized():
        return _already(layout)
    if layout.process_count == 1:
        return layout
    if backends_started():
        raise DistributedError(
            "st.init_distributed() comes too late: JAX has already started its devices in this "
            "process (any jax.devices(), array or computation does that). Call it first, right "
            "after the imports."
        )
    progress = Progress.from_environment(environ)
    progress.phase("dist_init")
    _join(layout, bind_address, timeout, heartbeat_timeout, announce)
    if environ.get(SUPERVISOR_VARIABLE) is None:
        # Without our launcher nobody has made sure yet that an error ends this process.
        install_excepthook(environ)
    progress.phase("setup")
    progress.close()
    if layout.process_index == 0:
        announce(str(layout))
    return layout


def _layout(
    coordinator: str | None,
    process_count: int | None,
    process_index: int | None,
    local_device_ids: Sequence[int] | None,
    environ: Mapping[str, str],
) -> ProcessLayout:
    given = {
        "coordinator": coordinator,
        "process_count": process_count,
        "process_index": process_index,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        layout = detect_layout(environ, visible_gpus=count_nvidia_devices() or None)
    elif missing or process_count is None or process_index is None:
        raise DistributedError(f"st.init_distributed: also needs {', '.join(missing)}")
    elif not 0 <= process_index < process_count:
        raise DistributedError(
            f"process_index={process_index} of process_count={process_count}: indices run from 0 "
            f"to {process_count - 1}"
        )
    else:
        layout = ProcessLayout(process_index, process_count, coordinator, None, "arguments")
    if local_device_ids is None:
        return layout
    ids = tuple(local_device_ids)
    return replace(layout, local_device_ids=ids, devices_per_process=len(ids))


def _already(layout: ProcessLayout) -> ProcessLayout:
    index, count = jax.process_index(), jax.process_count()
    if layout.source == "single":
        return ProcessLayout(index, count, None, jax.local_device_count(), "arguments")
    if (layout.process_index, layout.process_count) != (index, count):
        raise DistributedError(
            f"JAX is already initialised as process {index} of {count}, but "
            f"{layout.source} says process {layout.process_index} of {layout.process_count}"
        )
    return layout


def _join(
    layout: ProcessLayout,
    bind_address: str | None,
    timeout: float,
    heartbeat_timeout: int,
    announce: Callable[[str], None],
) -> None:
    assert layout.coordinator is not None, "several processes always have one"
    refuse_loopback(layout)
    if (getattr(jax.config, "jax_platforms", None) or "").startswith("cpu"):
        require_own_name(socket.gethostname())
    bind_address = bind_address or default_bind_address(layout)
    started = time.monotonic()
    roll_call(
        layout.process_index,
        layout.process_count,
        layout.coordinator,
        bind_address,
        facts={
            "python": ".".join(map(str, sys.version_info[:2])),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        },
        timeout=timeout,
        remind=announce,
    )
    left = timeout - (time.monotonic() - started)
    jax.distributed.initialize(
        layout.coordinator,
        layout.process_count,
        layout.process_index,
        local_device_ids=layout.local_device_ids,
        cluster_detection_method="deactivate",  # we decided; JAX would otherwise guess device ids
        initialization_timeout=int(max(left, 30.0)),
        heartbeat_timeout_seconds=heartbeat_timeout,
        coordinator_bind_address=bind_address,
    )
