"""Hardware you have, or think of renting: peaks, memory and links of each chip, with their source.

`hardware("h100:8x8")` is eight hosts of eight chips, `hardware("v5p:4x4x4")` a TPU slice,
`hardware("cpu:8")` eight host devices, `hardware("local")` this machine as `shardtrain doctor`
measured it. Nothing here imports JAX or touches a device.

All rates are dense (no sparsity), per chip, one direction, in SI units: FLOP/s and bytes/s.
`matmul` is what large matrix multiplications reach when measured, not what a datasheet promises.
"""

import dataclasses
import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from shardtrain.errors import HardwareError, suggest

GB = 1e9
TFLOP = 1e12

_DATASHEET = "NVIDIA {} datasheet, dense rates"
_MAMF = "matmul: stas00/ml-engineering compute/accelerator (maximum achievable matmul FLOP/s)"
_ASSUMED = "matmul: an assumed share of the peak"
_BOOK = "jax-ml/scaling-book, 'How to think about TPUs'; cloud.google.com/tpu/docs"
_TPU_MATMUL = "matmul: 0.9 of peak, typical of large XLA matmuls"


@dataclass(frozen=True)
class Chip:
    """One accelerator: what it can compute, hold and move.

    Attributes:
        name: the name used in hardware strings.
        kind: "gpu", "tpu" or "cpu".
        memory: bytes of device memory.
        peak: (dtype, FLOP/s) pairs, dense; dtypes are "bf16", "fp8", "fp4", "int8", "fp32".
        matmul: fraction of the peak that large bf16 matmuls reach.
        matmul_low: the same for 8-bit and 4-bit operands.
        memory_bandwidth: bytes/s of device memory.
        link_bandwidth: bytes/s one way, per chip, into the fast domain (NVLink or all ICI links).
        link_latency: seconds per hop or per collective step in the fast domain.
        network_bandwidth: bytes/s one way, per chip, out of the fast domain (NIC or DCN).
        network_latency: seconds per collective step across the network.
        host_bandwidth: bytes/s one way between chip and host memory.
        chips_per_host: default for a host.
        domain: chips in one fast domain (0: the whole slice).
        torus: dims of the ICI torus, 0 for a switch.
        devices_per_chip: JAX devices that one chip shows as.
        source: where the figures come from.
    """

    name: str
    kind: str
    memory: float
    peak: tuple[tuple[str, float], ...]
    matmul: float
    matmul_low: float
    memory_bandwidth: float
    link_bandwidth: float
    link_latency: float
    network_bandwidth: float
    network_latency: float
    host_bandwidth: float
    chips_per_host: int
    domain: int
    torus: int
    devices_per_chip: int
    source: str

    def peak_flops(self, dtype: str = "bf16") -> float:
        """Peak FLOP/s for a dtype; a dtype the chip lacks runs at the next wider one it has."""
        peaks = dict(self.peak)
        wider = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "fp16": "bf16", "tf32": "fp32"}
        while dtype not in peaks:
            if dtype not in wider:
                raise HardwareError(f"dtype {dtype!r} is unknown; {suggest(dtype, peaks)}")
            dtype = wider[dtype]
        return peaks[dtype]

    def matmul_flops(self, dtype: str = "bf16") -> float:
        """FLOP/s that large matmuls reach in practice."""
        low = dtype in {"fp8", "fp4", "int8"}
        return self.peak_flops(dtype) * (self.matmul_low if low else self.matmul)


def _gpu(name: str, memory: float, fp32: float, bf16: float, fp8: float, fp4: float, matmul: float,
         matmul_low: float, hbm: float, nvlink: float, nic: float, host: float, domain: int,
         source: str) -> Chip:  # fmt: skip
    """A GPU from datasheet units: GB, TFLOP/s, GB/s."""
    rates = (("fp4", fp4), ("fp8", fp8), ("bf16", bf16), ("fp32", fp32))
    peak = tuple((dtype, rate * TFLOP) for dtype, rate in rates if rate)
    per_host = 4 if domain > 8 else 8
    return Chip(name, "gpu", memory * GB, peak, matmul, matmul_low, hbm * GB, nvlink * GB, 4e-6,
                nic * GB, 12e-6, host * GB, per_host, domain, 0, 1, source)  # fmt: skip


def _tpu(name: str, memory: float, bf16: float, low: float, low_name: str, hbm: float, link: float,
         torus: int, dcn: float, host: float, per_host: int, devices: int = 1) -> Chip:  # fmt: skip
    """A TPU; `link` is GB/s one way of one ICI link, two links per torus dim are used at once."""
    peak: tuple[tuple[str, float], ...] = (("bf16", bf16 * TFLOP), ("fp32", bf16 * TFLOP / 8))
    if low:
        peak = ((low_name, low * TFLOP), *peak)
    ici = 2 * torus * link * GB
    return Chip(name, "tpu", memory * GB, peak, 0.9, 0.85, hbm * GB, ici, 1e-6, dcn * GB, 30e-6,
                host * GB, per_host, 0, torus, devices, f"{_BOOK}; {_TPU_MATMUL}")  # fmt: skip


_CHIPS = (
    _gpu("v100", 16, 15.7, 125, 0, 0, 0.75, 0.75, 900, 150, 3.125, 12, 8,
         f"{_DATASHEET.format('V100 SXM2')}; 25 Gb/s per p3.16xlarge host"),
    _gpu("a100", 80, 19.5, 312, 0, 0, 0.869, 0.869, 2039, 300, 25, 25, 8,
         f"{_DATASHEET.format('A100 SXM 80GB')}; {_MAMF}; 8x200 Gb/s HDR per DGX A100"),
    _gpu("a100-40gb", 40, 19.5, 312, 0, 0, 0.869, 0.869, 1555, 300, 25, 25, 8,
         f"{_DATASHEET.format('A100 SXM 40GB')}; {_MAMF}; 8x200 Gb/s HDR per DGX A100"),
    _gpu("h100", 80, 67, 989.4, 1978.9, 0, 0.803, 0.709, 3350, 450, 50, 55, 8,
         f"{_DATASHEET.format('H100 SXM')}; {_MAMF}; 8x400 Gb/s NDR per DGX H100"),
    _gpu("h200", 141, 67, 989.4, 1978.9, 0, 0.803, 0.734, 4800, 450, 50, 55, 8,
         f"{_DATASHEET.format('H200 SXM')}; {_MAMF}; 8x400 Gb/s NDR per DGX H200"),
    _gpu("gh200", 96, 67, 989.4, 1978.9, 0, 0.837, 0.776, 4000, 450, 50, 350, 32,
         f"{_DATASHEET.format('GH200')}; {_MAMF}"),
    _gpu("b200", 180, 75, 2250, 4500, 9000, 0.776, 0.763, 7700, 900, 50, 55, 8,
         f"{_DATASHEET.format('HGX B200')}; {_MAMF}; 8x400 Gb/s per DGX B200"),
    _gpu("b300", 270, 75, 2250, 4500, 13500, 0.786, 0.745, 8000, 900, 100, 110, 8,
         f"{_DATASHEET.format('HGX B300')}; {_MAMF}; 8x800 Gb/s per DGX B300"),
    _gpu("gb200", 186, 80, 2500, 5000, 10000, 0.729, 0.723, 8000, 900, 50, 350, 72,
         f"{_DATASHEET.format('GB200 NVL72')}; {_MAMF}; ConnectX-7 400 Gb/s per GPU"),
    _gpu("gb300", 279, 80, 2500, 5000, 15000, 0.786, 0.745, 8000, 900, 100, 350, 72,
         f"{_DATASHEET.format('GB300 NVL72')}; {_MAMF} (B300's); ConnectX-8 800 Gb/s per GPU"),
    _gpu("a800", 80, 19.5, 312, 0, 0, 0.869, 0.869, 2039, 200, 25, 25, 8,
         f"A100 with NVLink cut to 400 GB/s (NVIDIA A800 datasheet); {_MAMF} (A100's)"),
    _gpu("h800", 80, 67, 989.4, 1978.9, 0, 0.803, 0.709, 3350, 200, 50, 55, 8,
         f"H100 with NVLink cut to 400 GB/s (NVIDIA H800; arXiv:2412.19437 3.1); {_MAMF} (H100's)"),
    _gpu("h20", 96, 44, 148, 296, 0, 0.9, 0.9, 4000, 450, 50, 55, 8,
         f"NVIDIA H20 datasheet, dense rates; {_ASSUMED}"),
    _gpu("l40s", 48, 91.6, 362, 733, 0, 0.65, 0.65, 864, 28, 25, 28, 8,
         f"{_DATASHEET.format('L40S')}, PCIe only; {_ASSUMED}"),
    _gpu("mi250x", 128, 95.7, 383, 0, 0, 0.6, 0.6, 3277, 250, 25, 25, 8,
         f"AMD Instinct MI250X datasheet (whole module, two dies); {_ASSUMED}"),
    _gpu("mi300x", 192, 163.4, 1307.4, 2614.9, 0, 0.55, 0.5, 5300, 448, 50, 55, 8,
         f"AMD Instinct MI300X datasheet, dense rates; {_ASSUMED}"),
    _gpu("mi325x", 256, 163.4, 1307.4, 2614.9, 0, 0.6, 0.55, 6000, 448, 50, 55, 8,
         f"AMD Instinct MI325X datasheet, dense rates; {_ASSUMED}"),
    _gpu("mi355x", 288, 157.3, 2516.6, 5033.2, 10066.3, 0.6, 0.55, 8000, 538, 50, 55, 8,
         f"AMD Instinct MI355X datasheet, dense rates; {_ASSUMED}"),
    _gpu("gaudi2", 96, 11, 432, 865, 0, 0.8, 0.7, 2450, 262, 37.5, 25, 8,
         f"Intel Gaudi 2 white paper, 24x100 Gb/s Ethernet; {_ASSUMED}"),
    _gpu("gaudi3", 128, 14.3, 1835, 1835, 0, 0.7, 0.7, 3700, 525, 75, 55, 8,
         f"Intel Gaudi 3 white paper, 24x200 Gb/s Ethernet; {_ASSUMED}"),
    _gpu("trainium", 32, 47.5, 190, 190, 0, 0.7, 0.7, 820, 192, 12.5, 12, 16,
         f"AWS Trainium product page; {_ASSUMED}"),
    _gpu("trainium2", 96, 181, 667, 1299, 0, 0.7, 0.7, 2900, 320, 25, 25, 64,
         "AWS Trainium2 product page: 667 bf16 TFLOP/s, 96 GB at 2.9 TB/s, NeuronLink 1.28 TB/s"),
    _tpu("v2", 16, 46, 0, "int8", 700, 62, 2, 3.1, 12, 4),
    _tpu("v3", 32, 123, 0, "int8", 900, 70, 2, 6.25, 16, 4),
    _tpu("v4", 32, 275, 275, "int8", 1200, 45, 3, 6.25, 16, 4),
    _tpu("v5e", 16, 197, 394, "int8", 820, 45, 2, 6.25, 16, 4),
    _tpu("v5p", 96, 459, 918, "int8", 2765, 90, 3, 6.25, 16, 4),
    _tpu("v6e", 32, 918, 1836, "int8", 1640, 90, 2, 12.5, 32, 4),
    _tpu("tpu7x", 192, 2307, 4614, "fp8", 7380, 90, 3, 12.5, 32, 4, 2),
    Chip("cpu", "cpu", 4 * GB, (("bf16", 5e10), ("fp32", 5e10)), 0.8, 0.8, 1e10, 5e9, 5e-6, 1e9,
         5e-5, 1e10, 8, 0, 0, 1, "a laptop core, order of magnitude; measure it with doctor"),
)  # fmt: skip

CHIPS = {chip.name: chip for chip in _CHIPS}

_ALIASES = {
    "tpuv2": "v2", "tpuv3": "v3", "tpuv4": "v4", "tpuv5e": "v5e", "tpuv5p": "v5p", "tpuv6e": "v6e",
    "v5litepod": "v5e", "trillium": "v6e", "ironwood": "tpu7x", "v7x": "tpu7x", "tpuv7x": "tpu7x",
    "tpuv7": "tpu7x", "trainium1": "trainium", "trn1": "trainium", "trn2": "trainium2",
    "h100sxm": "h100", "a100-80gb": "a100", "h100-80gb": "h100", "a10040gb": "a100-40gb",
}  # fmt: skip


def chip(name: str) -> Chip:
    """The chip of that name.

    Args:
        name: for example "h100", "v5p" or "TPUv5p" (case does not matter).

    Raises:
        HardwareError: the name is not known; the nearest known name is suggested.

    Example:
        >>> chip("H100").memory / 1e9
        80.0
    """
    key = name.strip().lower().replace(" ", "").replace("_", "-")
    key = _ALIASES.get(key, key)
    if key not in CHIPS:
        raise HardwareError(f"hardware {name!r} is unknown; {suggest(key, CHIPS)}")
    return CHIPS[key]


@dataclass(frozen=True)
class Hardware:
    """Some chips and how they are wired: `topology` is (hosts, chips per host) or the TPU torus."""

    chip: Chip
    topology: tuple[int, ...]

    @property
    def chip_count(self) -> int:
        """Number of chips."""
        return math.prod(self.topology)

    @property
    def device_count(self) -> int:
        """Number of JAX devices (a TPU7x chip is two)."""
        return self.chip_count * self.chip.devices_per_chip

    @property
    def host_count(self) -> int:
        """Number of hosts."""
        if self.chip.kind == "tpu":
            return max(1, self.chip_count // self.chip.chips_per_host)
        return self.topology[0]

    @property
    def domain_size(self) -> int:
        """Chips that reach each other over the fast links (NVLink domain, or the TPU slice)."""
        if self.chip.kind == "gpu" and self.chip.domain <= 8:
            return self.topology[-1]
        return min(self.chip_count, self.chip.domain or self.chip_count)

    @property
    def memory(self) -> float:
        """Bytes of memory on all chips together."""
        return self.chip.memory * self.chip_count

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.topology))}"

    def rows(self) -> list[tuple[str, str]]:
        """(quantity, value) pairs as printed."""
        c = self.chip
        peaks = ", ".join(f"{name} {_short(rate / TFLOP)}" for name, rate in c.peak)
        link = f"{c.torus}D torus" if c.torus else f"switch, {self.domain_size} chips"
        return [
            ("chips", f"{self.chip_count} on {self.host_count} hosts"),
            ("memory per chip", f"{c.memory / GB:.4g} GB at {_rate(c.memory_bandwidth)} GB/s"),
            ("peak TFLOP/s (dense)", peaks),
            ("achievable bf16 matmul", f"{_short(c.matmul_flops() / TFLOP)} TFLOP/s"),
            ("fast links", f"{_rate(c.link_bandwidth)} GB/s one way ({link})"),
            ("network per chip", f"{_rate(c.network_bandwidth)} GB/s one way"),
            ("host copies", f"{_rate(c.host_bandwidth)} GB/s"),
            ("source", c.source),
        ]

    def __rich__(self) -> Table:
        table = Table(title=str(self), show_header=False)
        for name, value in self.rows():
            table.add_row(name, value)
        return table

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table><caption>{html.escape(str(self))}</caption>{cells}</table>"


def _rate(value: float) -> str:
    """Bytes/s in GB/s."""
    return _short(value / GB)


def _short(value: float) -> str:
    """Datasheet figures as they are printed there, measured ones with three digits."""
    return f"{value:,g}" if float(f"{value:.5g}") == value or value >= 1000 else f"{value:.3g}"


def hardware(spec: "str | Hardware") -> Hardware:
    """Hardware from a string: `"h100:8x8"` (hosts x chips per host), `"v5p:4x4x4"`, `"cpu:8"`.

    A bare name is one host; one number is a chip count, filled host by host.

    Args:
        spec: the string, or a `Hardware`, which is returned as it is.

    Raises:
        HardwareError: the chip is unknown or the topology is malformed.

    Example:
        >>> hardware("h100:8x8").device_count
        64
        >>> hardware("v5p:4x4x4").chip.memory / 1e9
        96.0
    """
    if isinstance(spec, Hardware):
        return spec
    name, _, shape = spec.partition(":")
    if name.strip().lower() == "local":
        return _local(shape)
    found = chip(name)
    if not shape:
        return Hardware(found, (1, found.chips_per_host))
    parts = shape.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        form = "4x4x4" if found.kind == "tpu" else "8x8"
        raise HardwareError(
            f"topology {shape!r} of {spec!r} is not positive numbers joined by 'x'; "
            f"write for example '{found.name}:{form}'"
        )
    sizes = tuple(int(part) for part in parts)
    if found.kind == "tpu":
        if len(sizes) > found.torus:
            raise HardwareError(
                f"{spec!r}: {found.name} is a {found.torus}D torus, got {len(sizes)} numbers"
            )
        return Hardware(found, sizes)
    if len(sizes) > 2:
        raise HardwareError(f"{spec!r}: give hosts x chips per host, got {len(sizes)} numbers")
    if len(sizes) == 1:
        sizes = _fill_hosts(found, sizes[0])
    return Hardware(found, sizes)


def _fill_hosts(found: Chip, count: int) -> tuple[int, int]:
    """(hosts, chips per host) for a chip count."""
    per_host = found.chips_per_host if found.kind == "gpu" else count
    if count <= per_host:
        return 1, count
    if count % per_host:
        raise HardwareError(
            f"{found.name}:{count} does not fill hosts of {per_host}; "
            f"write hosts x chips per host, for example '{found.name}:{count}x1'"
        )
    return count // per_host, per_host


def chip_of_device(kind: str) -> Chip | None:
    """The chip a JAX device is, by its `device_kind` ("NVIDIA H100 80GB HBM3"); None: not known.

    Example:
        >>> chip_of_device("NVIDIA H200").name
        'h200'
    """
    words = kind.lower().replace("v5 lite", "v5e").replace("v6 lite", "v6e").replace("-sxm4", "")
    names = sorted((n for n, c in CHIPS.items() if c.kind != "cpu"), key=len, reverse=True)
    return next((CHIPS[name] for name in names if name in words.replace(" ", "-")), None)


def local_file() -> Path:
    """Where `shardtrain doctor` keeps what it measured."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "shardtrain", "local.json")


def save_local(measured: Hardware, notes: Mapping[str, Any]) -> Path:
    """Keep a measured machine for `hardware("local")`.

    Args:
        measured: its chip is named "local".
        notes: kept beside it, JSON-able.
    """
    path = local_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(measured.chip)
    text = json.dumps({"chip": fields, "topology": measured.topology, **notes}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def measured_locally(kind: str, count: int) -> bool:
    """Whether `shardtrain doctor` has measured devices like these.

    Args:
        kind: JAX's `device_kind`.
        count: how many; virtual CPU devices share cores, so their number must be the same.
    """
    path = local_file()
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = found["device_kind"] == kind
        return same and (kind.lower() != "cpu" or math.prod(found["topology"]) == count)
    except (ValueError, KeyError, TypeError):
        return False  # `hardware("local")` says what is wrong with it


def _local(shape: str) -> Hardware:
    """This machine as it was measured, or more of the same."""
    path = local_file()
    if not path.is_file():
        raise HardwareError("hardware 'local' is not measured yet: run `shardtrain doctor` first")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = dict(found["chip"])
        fields["peak"] = tuple((name, rate) for name, rate in fields["peak"])
        measured, topology = Chip(**fields), tuple(found["topology"])
    except (ValueError, KeyError, TypeError) as error:
        raise HardwareError(f"{path} cannot be read ({error}); run `shardtrain doctor`") from error
    if not shape:
        return Hardware(measured, topology)
    parts = shape.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise HardwareError(f"'local:{shape}': give devices, or hosts x devices per host")
    sizes = tuple(int(part) for part in parts)
    return Hardware(measured, sizes if len(sizes) == 2 else (1, sizes[0]))
