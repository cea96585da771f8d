"""`shardtrain doctor`: measure the machine, say what is wrong, keep it for the planner."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.doctor.measure import (
    ACCELERATOR,
    CPU,
    Link,
    Sizes,
    disk_rates,
    host_copy_rates,
    link_rates,
    matmul_rate,
    memory_bandwidth,
)
from shardtrain.doctor.problems import describe_devices, host_memory, problems, versions
from shardtrain.errors import MeshError
from shardtrain.hardware import Chip, Hardware, chip_of_device, save_local
from shardtrain.tables import Table


@dataclass(frozen=True)
class Examination:
    """What was measured on this machine. Rates are of one device while all are busy.

    Attributes:
        devices: how many, of which kind.
        kind: JAX's `device_kind`.
        matmul: dtype -> FLOP/s.
        memory_bandwidth: bytes/s.
        links: an all-reduce over each mesh axis.
        host_to_device: bytes/s.
        device_to_host: bytes/s.
        disk_write: bytes/s, flushed.
        disk_read: bytes/s, perhaps from the cache.
        versions: package -> version.
        problems: what is wrong, with remedies.
        hardware: these figures as hardware for the planner: `st.hardware("local")`.
        seconds: how long it took.
    """

    devices: str
    kind: str
    matmul: Mapping[str, float]
    memory_bandwidth: float
    links: tuple[Link, ...]
    host_to_device: float
    device_to_host: float
    disk_write: float
    disk_read: float
    versions: Mapping[str, str]
    problems: tuple[str, ...]
    hardware: Hardware
    seconds: float

    def save(self) -> Path:
        """Keep it for `st.hardware("local")` and the planner; returns where."""
        return save_local(self.hardware, {
            "devices": self.devices, "device_kind": self.kind, "versions": dict(self.versions),
            "links": [dataclasses.asdict(link) for link in self.links],
            "disk_write": self.disk_write, "disk_read": self.disk_read,
        })  # fmt: skip

    def table(self) -> Table:
        """Quantity, value, what it is compared with."""
        listed = chip_of_device(self.kind)
        share = lambda rate, what: f"{rate / what(listed):.0%} of the datasheet" if listed else ""
        rows = [("devices", self.devices, "")]
        for dtype, rate in self.matmul.items():
            told = share(rate, lambda chip, dtype=dtype: chip.peak_flops(dtype))
            rows.append((f"matmul {dtype}", f"{rate / 1e12:.3g} TFLOP/s", told))
        told = share(self.memory_bandwidth, lambda chip: chip.memory_bandwidth)
        rows.append(("device memory", f"{self.memory_bandwidth / 1e9:.3g} GB/s", told))
        for link in self.links:
            rate = f"{link.bandwidth / 1e9:.3g} GB/s, {1e6 * link.latency:.0f} us"
            told = share(link.bandwidth, lambda chip: chip.link_bandwidth)
            rows.append((f"all-reduce over {link.axis} ({link.size})", rate, told))
        rows += [
            ("host to device", f"{self.host_to_device / 1e9:.3g} GB/s", ""),
            ("device to host", f"{self.device_to_host / 1e9:.3g} GB/s", ""),
            ("disk write", f"{self.disk_write / 1e9:.3g} GB/s", "flushed"),
            ("disk read", f"{self.disk_read / 1e9:.3g} GB/s", "perhaps from the cache"),
            ("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items()), ""),
        ]
        rows += [("problem", text, "") for text in self.problems]
        if not self.problems:
            rows.append(("problems", "none found", ""))
        columns = ("", "each device, all busy", "")
        return Table("This machine", columns, tuple(rows), (f"measured in {self.seconds:.1f} s",))

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def examine(
    axes: Mapping[str, int] | None = None,
    directory: str | Path = ".",
    devices: Sequence[jax.Device] | None = None,
    sizes: Sizes | None = None,
) -> Examination:
    """Measure this machine: seconds on a CPU or an accelerator.

    Args:
        axes: mesh axis -> size, in mesh order, whose links are measured; None: all as one axis.
        directory: where files are written and read.
        devices: which; None: all.
        sizes: how much work; None: fit for the platform.

    Raises:
        MeshError: the axes do not multiply to the number of devices.
    """
    started = time.perf_counter()
    devices = list(devices or jax.devices())
    axes = dict(axes or {"all": len(devices)})
    if math.prod(axes.values()) != len(devices):
        shown = ", ".join(f"{name}={size}" for name, size in axes.items())
        raise MeshError(f"the mesh {shown} needs {math.prod(axes.values())} devices, "
                        f"there are {len(devices)}")  # fmt: skip
    sizes = sizes or (CPU if devices[0].platform == "cpu" else ACCELERATOR)
    dtypes = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
    matmul = {name: matmul_rate(devices, sizes.matmul, dtype) for name, dtype in dtypes.items()}
    bandwidth = memory_bandwidth(devices, sizes.array)
    links = tuple(link_rates(devices, axes, sizes.array))
    there, back = host_copy_rates(devices[0], sizes.array)
    write, read = disk_rates(directory, sizes.file)
    found = versions()
    return Examination(
        describe_devices(devices), devices[0].device_kind, matmul, bandwidth, links, there, back,
        write, read, found,
        tuple(problems(found, devices, directory)),
        as_hardware(devices, matmul, bandwidth, links, there),
        time.perf_counter() - started,
    )  # fmt: skip


def as_hardware(
    devices: Sequence[jax.Device], matmul: Mapping[str, float], bandwidth: float,
    links: Sequence[Link], host: float,
) -> Hardware:  # fmt: skip
    """Measured figures as a chip named "local"; what was not measured comes from the chip's table.

    Args:
        devices: these.
        matmul: dtype -> FLOP/s.
        bandwidth: device memory, bytes/s.
        links: all-reduces.
        host: bytes/s between host and device.
    """
    hosts = len({d.process_index for d in devices})
    each = len(devices) // hosts
    listed = chip_of_device(devices[0].device_kind)
    link = max((one.bandwidth for one in links), default=bandwidth)
    wait = min((one.latency for one in links), default=0.0)
    steps = 1 + (len(devices) - 1).bit_length()
    source = f"measured on {describe_devices(devices)}"
    if listed is None:
        memory = host_memory() / each
        peak = tuple(sorted(matmul.items()))
        chip = Chip("local", devices[0].platform, memory, peak, 1.0, 1.0, bandwidth, link,
                    wait / steps, link, wait, host, each, 0, 0, 1, source)  # fmt: skip
    else:
        share = min(1.0, matmul["bf16"] / listed.peak_flops("bf16"))
        changes: dict[str, Any] = {"matmul": share, "memory_bandwidth": bandwidth}
        if links:
            changes |= {"link_bandwidth": link, "link_latency": wait / steps}
        chip = dataclasses.replace(
            listed, name="local", host_bandwidth=host, chips_per_host=each,
            source=f"{source}; the rest: {listed.source}", **changes,
        )  # fmt: skip
    return Hardware(chip, (hosts, each))
