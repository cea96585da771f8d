"""One layout on some chips with its price, in the words of the field."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardtrain.hardware import Hardware
from shardtrain.planner.search import Candidate, Pruned
from shardtrain.strategy import AXES, Strategy

ZERO = {1: "ZeRO-1", 2: "ZeRO-2", 3: "FSDP"}


@dataclass(frozen=True)
class Choice:
    """A layout that fits.

    Attributes:
        hardware: the chips it runs on.
        candidate: strategy, memory, time and terms.
        cost: per step: dollars where prices were given, else chip-seconds.
    """

    hardware: Hardware
    candidate: Candidate
    cost: float

    @property
    def strategy(self) -> Strategy:
        """The layout."""
        return self.candidate.strategy

    @property
    def step_time(self) -> float:
        """Seconds per step."""
        return self.candidate.step_time

    @property
    def memory_bytes(self) -> float:
        """Bytes on the fullest device."""
        return self.candidate.memory.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over the bf16 peak."""
        return self.candidate.mfu

    @property
    def reason(self) -> str:
        """Why it won or lost."""
        return self.candidate.reason

    @property
    def kind(self) -> str:
        """`FSDP + tensor`: see `kind_of`."""
        return kind_of(vars(self.strategy))

    @property
    def tokens_per_second(self) -> float:
        """Tokens (or examples) per second, all chips."""
        job = self.candidate.job
        return job.step_tokens / self.step_time if job else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, sizes in bytes, times in seconds."""
        return {
            "hardware": str(self.hardware),
            "strategy": str(self.strategy),
            "kind": self.kind,
            "step_time": self.step_time,
            "mfu": self.mfu,
            "cost": self.cost,
            "memory": self.candidate.memory.classes(),
            "memory_bytes": self.memory_bytes,
            "terms": dict(self.candidate.terms),
            "reason": self.reason,
        }


def kind_of(strategy: Mapping[str, Any]) -> str:
    """The family of a layout.

    Args:
        strategy: fields of a `Strategy`.

    Example:
        >>> kind_of({"fsdp": 8, "tensor": 4, "zero": 3})
        'FSDP + tensor'
        >>> kind_of({"data": 8})
        'data parallel'
    """
    size = lambda axis: strategy.get(axis, 1)
    parts = []
    if size("fsdp") > 1:
        parts.append(ZERO.get(strategy.get("zero", 3), "data parallel"))
    elif size("data") > 1:
        parts.append("data parallel")
    parts += [axis for axis in ("tensor", "pipeline", "context", "expert") if size(axis) > 1]
    return " + ".join(parts) or "one device"


def axes_text(strategy: Mapping[str, Any]) -> str:
    """`fsdp 8 x tensor 4`: mesh axes above one, in mesh order."""
    sizes = [(axis, strategy.get(axis, 1)) for axis in AXES]
    return " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1) or "one device"


def details_text(strategy: Mapping[str, Any]) -> str:
    """`8 microbatches, remat full`: what else differs from the defaults."""
    micro = strategy.get("num_microbatches", 1)
    parts = [f"{micro} microbatch{'es' if micro > 1 else ''}"]
    if strategy.get("pipeline", 1) > 1:
        chunks = strategy.get("virtual_stages", 1)
        parts.append(strategy.get("schedule", "1f1b") + (f" x{chunks}" if chunks > 1 else ""))
    if strategy.get("remat", "none") != "none":
        parts.append(f"remat {strategy['remat']}")
    if strategy.get("offload"):
        parts.append("offload")
    if strategy.get("precision", "bf16") != "bf16":
        parts.append(str(strategy["precision"]))
    return ", ".join(parts)


def nearest_of(pruned: list[Pruned]) -> Pruned:
    """The one that lacks the least memory, or the first where memory is not the problem."""
    short = [one for one in pruned if one.shortfall]
    return min(short, key=lambda one: one.shortfall) if short else pruned[0]


def seconds_text(seconds: float) -> str:
    """`6.72 s`, `48.1 ms`."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 0.5 else f"{1e3 * seconds:.3g} ms"
