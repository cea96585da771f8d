"""Which chips and network a published run had."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from shardtrain.errors import HardwareError
from shardtrain.hardware import CHIPS, Chip, chip


def read_hardware(record: Mapping[str, Any]) -> Chip:
    """The chip of a record, with the network, memory and power limit that its words tell.

    Raises:
        HardwareError: it names no chip, or one that is not known.
    """
    found = read_chip(record)
    label = str((record.get("hardware") or {}).get("interconnect") or "").lower()
    if "96gb" in label and found.name == "h100":
        found = dataclasses.replace(found, memory=96e9)
    if "500w" in label and found.name == "h100":  # 500 of 700 W costs clock speed
        slower, low = 0.82 * found.matmul, 0.82 * found.matmul_low
        found = dataclasses.replace(found, matmul=slower, matmul_low=low)
    return dataclasses.replace(found, network_bandwidth=network_bandwidth(record, found))


def read_chip(record: Mapping[str, Any]) -> Chip:
    """The chip of a record.

    Raises:
        HardwareError: it names no chip, or one that is not known.
    """
    name = str((record.get("hardware") or {}).get("chip") or "")
    if not name:
        peak = dict((record.get("hardware") or {}).get("peak_tflops") or {}).get("bf16")
        if peak:
            return min(CHIPS.values(), key=lambda one: abs(one.peak_flops() / 1e12 - peak))
        raise HardwareError(
            f"record {record.get('id')!r} names neither hardware.chip nor its bf16 peak"
        )
    label = f"{record.get('source') or ''} {record.get('id') or ''}".lower()
    if name.lower() == "a100" and ("a100 40gb" in label or "a100_40gb" in label):
        name = "a100-40gb"
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    inside = [known for known in CHIPS if len(known) > 2 and known in key]  # "NVIDIA H200 SXM"
    if key not in CHIPS and inside and not key.startswith("tpu") and "40gb" not in key:
        name = max(inside, key=len)
    return chip(name)


def network_bandwidth(record: Mapping[str, Any], found: Chip) -> float:
    """Bytes/s one way per chip out of a host, from the words of `hardware.interconnect`."""
    text = str((record.get("hardware") or {}).get("interconnect") or "").lower()
    if found.kind != "gpu":
        return found.network_bandwidth
    if "tcpx" in text:
        return 4 * 200e9 / 8 / 8  # GPUDirect-TCPX: four 200 Gb/s cards per host of eight
    rate = re.search(r"(?:(\d)x ?)?(?:[a-z]+ )?(\d+) ?gb/s", text)
    if rate is None:
        return found.network_bandwidth
    cards, speed = rate.groups()
    per_host = float(speed) * int(cards or 1) * 1e9 / 8
    if cards or "per node" in text or float(speed) >= 800:
        return per_host / 8
    return per_host
