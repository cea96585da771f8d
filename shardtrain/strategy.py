"""What you want, as plain frozen data: axis sizes, ZeRO level, schedule, precision, sync.

A `Strategy` is printable, hashable and JSON round-trips. It says nothing about a model or
devices: `st.plan` resolves it against both.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from shardtrain.algorithms import (
    check_component,
    check_pair,
    component_from_json,
    component_to_json,
    read_component,
)
from shardtrain.errors import StrategyError, suggest
from shardtrain.xla_options import OFF, check_xla

AXES = ("data", "fsdp", "pipeline", "expert", "context", "tensor")
"""Mesh axes in mesh order: the innermost (`tensor`) gets the nearest devices."""

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
REMAT = ("none", "full", "dots", "dots_no_batch")
PRECISIONS = ("fp32", "bf16")
_SPELLINGS = {"float32": "fp32", "f32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Strategy:
    """How to split one training step over a mesh.

    Args:
      data: Replicas: the batch is split, parameters are copied. One size may be -1 (fill).
      fsdp: The batch is split and, by `zero`, parameters are sharded too.
      pipeline: Stages of consecutive layers.
      expert: Experts of mixture-of-experts layers.
      context: The sequence dim of the batch.
      tensor: The width of the model (heads, mlp, vocab).
      zero: What is sharded over `fsdp`: 0 nothing, 1 optimizer state, 2 + gradients,
        3 + parameters.
      rules: `{logical axis name or parameter glob: mesh axes}` overrides. A value is a mesh axis
        name, a tuple of them (one dim over several axes), or None; for a glob (it contains `*`,
        `?`, `/` or `[`) the value is a tuple with one entry per dim. `{"pipeline": "layers/*"}`
        points at the block to pipeline.
      scan_layers: Run the repeated block as one loop, whose compile time does not grow with the
        number of layers and which gathers parameters (zero=3) one layer at a time; False: never;
        None: from 8 layers on, and where a model with a loop of its own is stored in shards.
        Pipeline stages always loop over their layers.
      sequence_parallel: Shard the residual stream's sequence dim over `tensor`.
      num_microbatches: Parts into which each global batch is split, one after another.
      schedule: Pipeline schedule: gpipe, 1f1b, interleaved, zero-bubble.
      virtual_stages: Model chunks per pipeline stage (interleaved).
      remat: What the backward pass recomputes: none, full (each repeated block), dots (keep
        matmul results), dots_no_batch (keep only weight matmuls).
      offload: Keep optimizer state in host memory.
      precision: fp32, or bf16 (fp32 master parameters, bf16 compute, fp32 reductions).
      max_grad_norm: Clip gradients to this global norm before the optimizer; None: no clipping.
      equal_microbatches: A scalar loss is a mean over equally weighted microbatches.
      sync: How replicas agree: `AllReduce()` (as None), `ParameterServer(...)`, `LocalSGD(...)`,
        `DiLoCo(...)` or `Gossip(...)`. Replicas are the members of the axis `data`.
      compression: What they send, smaller: `Int8()`, `Int4()`, `Float8()`, `TopK(fraction)`,
        `PowerSGD(rank)`, `Sign()`, all with error feedback; None: float32.
      dcn: Axis sizes across slices or hosts with a slower network, e.g. `{"data": 2}`.
      allow_replicated: Parameter globs that may stay replicated without an error.
      xla: Compiler flags of the step: "off", or presets of `shardtrain.xla_options` and
        `xla_flag=value`s joined by "+", for example "latency-hiding+cublas".

    Raises:
      StrategyError: A value is out of range or two fields contradict each other.

    Example:
      >>> s = Strategy.parse("data=4,tensor=2,num_microbatches=4")
      >>> s.tensor, str(s)
      (2, 'data=4,tensor=2,num_microbatches=4')
    """

    data: int = 1
    fsdp: int = 1
    pipeline: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 3
    rules: Mapping[str, Any] = field(default_factory=dict)
    scan_layers: bool | None = None
    sequence_parallel: bool = False
    num_microbatches: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    remat: str = "none"
    offload: bool = False
    precision: str = "fp32"
    max_grad_norm: float | None = None
    equal_microbatches: bool = False
    sync: Any = None
    compression: Any = None
    dcn: Mapping[str, int] = field(default_factory=dict)
    allow_replicated: tuple[str, ...] = ()
    xla: str = OFF

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        put("precision", _SPELLINGS.get(self.precision, self.precision))
        put("rules", FrozenDict({k: _tuples(v) for k, v in dict(self.rules).items()}))
        put("dcn", FrozenDict(dict(self.dcn)))
        allow = self.allow_replicated
        put("allow_replicated", (allow,) if isinstance(allow, str) else tuple(allow))
        _check(self)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size, in mesh order."""
        return {name: getattr(self, name) for name in AXES}

    def replace(self, **changes: Any) -> "Strategy":
        """A copy with some fields changed."""
        for name in changes:
            _known_field(name)
        return dataclasses.replace(self, **changes)

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """Read `"data=4,tensor=2,schedule=1f1b"`; the inverse of `str()`.

        Raises:
          StrategyError: Unknown field (the nearest is suggested) or unreadable value.
        """
        values: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in _split(text))):
            name, equals, value = (p.strip() for p in part.partition("="))
            if not equals:
                raise StrategyError(f"{part!r} in strategy {text!r} is not of the form field=value")
            _known_field(name)
            if name in values:
                raise StrategyError(f"strategy {text!r} gives {name!r} twice")
            values[name] = _parse_value(name, value)
        return cls(**values)

    def __str__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != _default(f):
                shown.append(f"{f.name}={_show(value)}")
        return ",".join(shown) or "data=1"

    def to_json(self) -> str:
        """A JSON object of the fields that differ from their defaults."""
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: changed[f.name] for f in fields(self) if changed[f.name] != _default(f)}
        return json.dumps(changed, default=_json_value)

    @classmethod
    def from_json(cls, text: str) -> "Strategy":
        """Read `to_json()` back.

        Raises:
          StrategyError: Not a JSON object of known fields.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise StrategyError(f"not JSON: {error}") from error
        if not isinstance(values, dict):
            raise StrategyError(f"not a JSON object of strategy fields: {text}")
        for name in values:
            _known_field(name)
        for name in ("sync", "compression"):
            if isinstance(values.get(name), dict):
                values[name] = component_from_json(name, values[name])
        return cls(**values)


class FrozenDict(dict):
    """A hashable dict: rules and dcn sizes inside a frozen `Strategy`."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items(), key=repr)))

    def _frozen(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a Strategy is frozen: use strategy.replace(...)")

    __ior__ = __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = _frozen  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return (FrozenDict, (dict(self),))


_SCALARS: dict[str, type] = {
    **dict.fromkeys(AXES, int),
    "zero": int,
    "num_microbatches": int,
    "virtual_stages": int,
    "max_grad_norm": float,
    "scan_layers": bool,
    "sequence_parallel": bool,
    "offload": bool,
    "equal_microbatches": bool,
    "schedule": str,
    "remat": str,
    "precision": str,
    "xla": str,
}


def _default(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _known_field(name: str) -> None:
    names = [f.name for f in fields(Strategy)]
    if name not in names:
        raise StrategyError(f"Strategy has no field {name!r}: {suggest(name, names)}")


def _parse_value(name: str, value: str) -> Any:
    kind = _SCALARS.get(name)
    if name in ("sync", "compression"):
        return None if value.lower() == "none" else read_component(name, value)
    if kind is None:
        raise StrategyError(f"{name!r} cannot be written in a strategy string; pass it in Python")
    if name in ("max_grad_norm", "scan_layers") and value.lower() == "none":
        return None
    if kind is bool:
        if value.lower() in ("true", "1", "yes"):
            return True
        if value.lower() in ("false", "0", "no"):
            return False
        raise StrategyError(f"{name}={value!r} is not true or false")
    try:
        return kind(value)
    except ValueError as error:
        raise StrategyError(f"{name}={value!r} is not {_a(kind)}") from error


def _a(kind: type) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return component_to_json(value)
    raise TypeError(f"{value!r} in a Strategy is not JSON")


def _split(text: str) -> list[str]:
    """At commas that are not inside parentheses."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise StrategyError(f"{name}={value!r} is not known: {suggest(str(value), known)}")


def _check(s: Strategy) -> None:
    for name, size in s.sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise StrategyError(f"{name}={size!r}: a mesh axis size is a whole number >= 1, or -1")
    if list(s.sizes.values()).count(-1) > 1:
        filled = [n for n, size in s.sizes.items() if size == -1]
        raise StrategyError(f"only one axis size may be -1, found {', '.join(filled)}")
    if isinstance(s.zero, bool) or s.zero not in (0, 1, 2, 3):
        raise StrategyError(f"zero={s.zero!r} is not 0, 1, 2 or 3")
    for name in ("num_microbatches", "virtual_stages"):
        value = getattr(s, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StrategyError(f"{name}={value!r} is not a whole number >= 1")
    _choice("schedule", s.schedule, SCHEDULES)
    _choice("remat", s.remat, REMAT)
    _choice("precision", s.precision, PRECISIONS)
    if s.scan_layers is not None and not isinstance(s.scan_layers, bool):
        raise StrategyError(f"scan_layers={s.scan_layers!r} is not True, False or None")
    for name in ("sequence_parallel", "offload", "equal_microbatches"):
        if not isinstance(getattr(s, name), bool):
            raise StrategyError(f"{name}={getattr(s, name)!r} is not True or False")
    for name in ("sync", "compression"):
        check_component(name, getattr(s, name))
    check_pair(s.sync, s.compression)
    if not isinstance(s.xla, str):
        raise StrategyError(f"xla={s.xla!r} is not a string such as 'latency-hiding'")
    check_xla(s.xla)
    norm = s.max_grad_norm
    if norm is not None and not (isinstance(norm, int | float) and norm > 0):
        raise StrategyError(f"max_grad_norm={s.max_grad_norm!r} is not a number > 0, or None")
    for name, size in s.dcn.items():
        if name not in AXES:
            raise StrategyError(f"dcn axis {name!r} is not a mesh axis: {suggest(name, AXES)}")
        total = s.sizes[name]
        if isinstance(size, bool) or not isinstance(size, int):
            raise StrategyError(f"dcn {name}={size!r} is not a whole number >= 1")
        if size < 1 or (total != -1 and total % size):
            raise StrategyError(f"dcn {name}={size} does not divide {name}={total}")
