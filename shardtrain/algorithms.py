"""How replicas agree and how what they send is compressed, as plain frozen data.

These are the values of `Strategy(sync=..., compression=...)`. They hold numbers only: what they do
is in `shardtrain.sync`, one file per algorithm.
"""

import ast
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from shardtrain.errors import StrategyError, suggest


class _Component:
    """Shown as it would be written: only what differs from the defaults."""

    def __repr__(self) -> str:
        value: Any = self
        changed = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, repr=False)
class AllReduce(_Component):
    """Every step applies the mean gradient of all replicas (the default).

    Args:
      explicit: Reduce-scatter and all-gather written out, instead of left to the compiler; within
        each host first where `dcn={"data": ...}` says how many there are.

    Example:
      >>> AllReduce(explicit=True)
      AllReduce(explicit=True)
    """

    explicit: bool = False


@dataclass(frozen=True, repr=False)
class ParameterServer(_Component):
    """Every parameter has an owner: push gradients to it, update there, pull parameters.

    Push is a reduce-scatter, pull an all-gather. With `max_staleness=k > 0` the gradient of a step
    is applied `k` steps later, always exactly `k`, so that its communication has no place in the
    critical path and a run can be repeated.

    Args:
      max_staleness: Steps between computing a gradient and applying it.
      delay_compensation: lambda of DC-ASGD (Zheng et al. 2017): adds `lambda * g * g * (parameters
        now - parameters then)`; 0 for none.

    Example:
      >>> ParameterServer(max_staleness=1).max_staleness
      1
    """

    max_staleness: int = 0
    delay_compensation: float = 0.0

    def __post_init__(self) -> None:
        _whole(self, "max_staleness", 0)
        _number(self, "delay_compensation", 0.0)
        if self.delay_compensation and not self.max_staleness:
            raise StrategyError(
                "ParameterServer(delay_compensation=...) corrects late gradients; with "
                "max_staleness=0 none is late. Set max_staleness >= 1"
            )


@dataclass(frozen=True, repr=False)
class Privacy(_Component):
    """Differential privacy of what each replica contributes: its change is clipped, noise is added.

    DP-FedAvg, McMahan et al. 2018 (arXiv:1710.06963): the mean of the clipped changes gets Gaussian
    noise of standard deviation `noise * clip / replicas`. It covers the parameters, not the
    reported losses, for who sees only the averages.

    Args:
      clip: Largest L2 norm of one replica's change of all parameters together.
      noise: Standard deviation of the noise on the sum of changes, in units of `clip`.
      seed: Of the noise; the same seed gives the same run.

    Example:
      >>> round(Privacy(clip=1.0, noise=5.0).epsilon(rounds=10, delta=1e-5), 2)
      3.23
    """

    clip: float
    noise: float
    seed: int = 0

    def __post_init__(self) -> None:
        _number(self, "clip", 0.0)
        _number(self, "noise", 0.0)
        _whole(self, "seed", 0)
        if not self.clip:
            raise StrategyError("Privacy(clip=0): nothing would ever change; give a norm > 0")

    def epsilon(self, rounds: int, delta: float) -> float:
        """The epsilon of (epsilon, delta)-privacy for a replica that takes part in every round.

        By zero-concentrated privacy of Gaussian noise, Bun & Steinke 2016 (arXiv:1605.02065).

        Args:
          rounds: Averages made, `steps / sync_every`.
          delta: As in the definition, e.g. 1e-5.
        """
        if not self.noise:
            return math.inf
        rho = rounds / (2 * self.noise**2)
        return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@dataclass(frozen=True, repr=False)
class LocalSGD(_Component):
    """Replicas train alone and average their parameters every `sync_every` steps.

    With `weighting="examples"` this is FedAvg (McMahan et al. 2017), with `"equal"` local SGD
    (Stich 2019). Each replica keeps its own optimizer moments.

    Args:
      sync_every: Steps between two averages, H.
      weighting: "examples": by the loss weight each replica saw since the last average; "equal".
      learning_rates: One factor per replica on its optimizer's updates; (): 1 for all.
      proximal: mu of FedProx (Li et al. 2020), the pull towards the last average: one number, or
        one per replica.
      privacy: `Privacy(...)`: clip each replica's change and add noise to their mean; with
        `weighting="equal"`, for a weight would tell of a replica's examples.

    Example:
      >>> LocalSGD(8).sync_every
      8
    """

    sync_every: int
    weighting: str = "examples"
    learning_rates: tuple[float, ...] = ()
    proximal: float | tuple[float, ...] = 0.0
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        _whole(self, "sync_every", 1)
        _weighting(self)
        if self.privacy is not None and not isinstance(self.privacy, Privacy):
            raise StrategyError(f"LocalSGD(privacy={self.privacy!r}) is not Privacy(clip, noise)")
        if self.privacy is not None and self.weighting != "equal":
            raise StrategyError(
                "LocalSGD(privacy=...) bounds what one replica changes, and weights by examples "
                'do not: use weighting="equal"'
            )
        object.__setattr__(self, "learning_rates", tuple(self.learning_rates))
        if isinstance(self.proximal, list | tuple):
            object.__setattr__(self, "proximal", tuple(self.proximal))


@dataclass(frozen=True, repr=False)
class Nesterov(_Component):
    """The outer optimizer of DiLoCo: SGD with Nesterov momentum.

    Args:
      learning_rate: Of the outer step.
      momentum: Of the outer step.

    Example:
      >>> Nesterov(momentum=0.8)
      Nesterov(momentum=0.8)
    """

    learning_rate: float = 0.7
    momentum: float = 0.9


@dataclass(frozen=True, repr=False)
class DiLoCo(_Component):
    """Local steps, then an outer optimizer on the mean change of the replicas.

    Douillard et al. 2023 (arXiv:2311.08105); fragments: arXiv:2501.18512.

    Args:
      sync_every: Inner steps between two outer steps of one parameter, H.
      outer_optimizer: `Nesterov(...)`, or any optax transformation (such a strategy cannot be
        written as a string or JSON). It gets `last agreed parameters - mean of the replicas`.
      fragments: Parts of the parameters that take turns: each is exchanged every H steps, at
        H / fragments steps from the next. The traffic is the same, its peak is divided.
      weighting: "equal", or "examples" as in `LocalSGD`.

    Example:
      >>> DiLoCo(100).outer_optimizer.learning_rate
      0.7
    """

    sync_every: int
    outer_optimizer: Any = Nesterov()
    fragments: int = 1
    weighting: str = "equal"

    def __post_init__(self) -> None:
        _whole(self, "sync_every", 1)
        _whole(self, "fragments", 1)
        _weighting(self)
        if self.fragments > self.sync_every:
            raise StrategyError(
                f"DiLoCo(sync_every={self.sync_every}, fragments={self.fragments}): there are not "
                "enough steps for each fragment to have its own; fragments <= sync_every"
            )


@dataclass(frozen=True, repr=False)
class Gossip(_Component):
    """Every `sync_every` steps each replica averages its parameters with its two ring neighbours.

    Nobody ever holds the average of all; it is computed where it is asked for (evaluation,
    checkpoints, `plan.model`). Lian et al. 2017 (arXiv:1705.09056).

    Args:
      sync_every: Steps between two exchanges.

    Example:
      >>> Gossip()
      Gossip()
    """

    sync_every: int = 1

    def __post_init__(self) -> None:
        _whole(self, "sync_every", 1)


@dataclass(frozen=True, repr=False)
class _Blocked(_Component):
    """Coded numbers in blocks that share a scale.

    Args:
      block_size: Numbers per scale, a multiple of 8.
      error_feedback: Add what was rounded away to the next exchange.
    """

    block_size: int = 256
    error_feedback: bool = True

    def __post_init__(self) -> None:
        _block(self)


@dataclass(frozen=True, repr=False)
class Int8(_Blocked):
    """8 bits per number, one float32 scale per block.

    Args:
      block_size: Numbers per scale, a multiple of 8.
      error_feedback: Add what was rounded away to the next exchange.
    """


@dataclass(frozen=True, repr=False)
class Int4(_Blocked):
    """4 bits per number, one float32 scale per block. Arguments as `Int8`."""

    block_size: int = 128


@dataclass(frozen=True, repr=False)
class Float8(_Blocked):
    """8-bit floating point (e4m3), one float32 scale per block. Arguments as `Int8`."""


@dataclass(frozen=True, repr=False)
class Sign(_Blocked):
    """One bit per number and the mean magnitude of its block. Arguments as `Int8`.

    EF-signSGD, Karimireddy et al. 2019 (arXiv:1901.09847).
    """

    block_size: int = 1024


@dataclass(frozen=True, repr=False)
class TopK(_Component):
    """Only the largest numbers of each array, 8 bytes for each (value and place).

    Lin et al. 2018 (arXiv:1712.01887).

    Args:
      fraction: Share of each array's numbers that is sent, at least one.
      error_feedback: Add what was not sent to the next exchange.
    """

    fraction: float
    error_feedback: bool = True

    def __post_init__(self) -> None:
        _number(self, "fraction", 0.0)
        if not 0 < self.fraction <= 1:
            raise StrategyError(f"TopK(fraction={self.fraction}): a share is in (0, 1]")


@dataclass(frozen=True, repr=False)
class PowerSGD(_Component):
    """Each matrix as a product of two thin ones, from one step of power iteration.

    Vogels et al. 2019 (arXiv:1905.13727). Vectors, and matrices that would not shrink, are sent
    whole.

    Args:
      rank: Columns of the thin matrices.
      error_feedback: Add what the product leaves out to the next exchange.
    """

    rank: int
    error_feedback: bool = True

    def __post_init__(self) -> None:
        _whole(self, "rank", 1)


SYNCS = (AllReduce, ParameterServer, LocalSGD, DiLoCo, Gossip)
COMPRESSIONS = (Int8, Int4, Float8, TopK, PowerSGD, Sign)
_KNOWN = {kind.__name__: kind for kind in (*SYNCS, *COMPRESSIONS, Nesterov, Privacy)}


def read_component(field: str, text: str) -> Any:
    """`"LocalSGD(8)"`, `"Int8"` or `"DiLoCo(100, fragments=2)"` as the value of a strategy field.

    Args:
      field: "sync" or "compression".
      text: A name, or a call with literal arguments.

    Raises:
      StrategyError: Not one of the known names, or unreadable arguments.

    Example:
      >>> read_component("sync", "LocalSGD(8)").sync_every
      8
    """
    try:
        expression = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise StrategyError(f"{field}={text!r} is not of the form Name or Name(...)") from error
    return check_component(field, _value(field, text, expression))


def _value(field: str, text: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _make(field, node.id, (), {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        args = [_value(field, text, a) for a in node.args]
        named = {k.arg: _value(field, text, k.value) for k in node.keywords if k.arg}
        return _make(field, node.func.id, args, named)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise StrategyError(f"{field}={text!r}: arguments are numbers, not expressions") from error


def component_from_json(field: str, described: dict[str, Any]) -> Any:
    """The inverse of `component_to_json`."""
    values = {
        name: component_from_json(field, value) if isinstance(value, dict) else value
        for name, value in described.items()
        if name != "kind"
    }
    return _make(field, str(described.get("kind")), (), values)


def component_to_json(value: Any) -> dict[str, Any]:
    """`{"kind": name, field: value}`.

    Raises:
      StrategyError: It holds something that is not plain data (an optax optimizer).
    """
    described: dict[str, Any] = {"kind": type(value).__name__}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item):
            item = component_to_json(item)
        elif item is not None and type(item) not in (bool, int, float, str, tuple):
            raise StrategyError(
                f"{type(value).__name__}({f.name}=...) holds a {type(item).__name__}, which cannot "
                "be written as JSON; st.Nesterov(learning_rate, momentum) can"
            )
        described[f.name] = item
    return described


def check_component(field: str, value: Any) -> Any:
    """The value, if it may stand in this field.

    Raises:
      StrategyError: It is something else; lists what may.
    """
    kinds = SYNCS if field == "sync" else COMPRESSIONS
    if value is not None and not isinstance(value, kinds):
        known = ", ".join(k.__name__ for k in kinds)
        raise StrategyError(f"{field}={value!r} is not one of {known}")
    return value


def check_pair(sync: Any, compression: Any) -> None:
    """Which compressions an algorithm takes.

    Raises:
      StrategyError: They do not go together.
    """
    if compression is None:
        return
    if isinstance(sync, LocalSGD) and sync.privacy is not None:
        raise StrategyError(
            "LocalSGD(privacy=...) clips each change once; what a compression kept back would be "
            "sent later, unclipped. Use compression=None"
        )
    if isinstance(sync, Gossip):
        raise StrategyError(
            "Gossip sends whole parameters to its neighbours, which cannot be compressed: use "
            "compression=None, or LocalSGD or DiLoCo, which send changes"
        )
    if isinstance(sync, ParameterServer) and isinstance(compression, TopK | PowerSGD):
        raise StrategyError(
            f"ParameterServer pushes to the owner of each number; {type(compression).__name__} "
            "sends to all. Use Int8, Int4, Float8 or Sign, or AllReduce"
        )


def _make(field: str, name: str, args: Any, named: dict[str, Any]) -> Any:
    kind = _KNOWN.get(name)
    if kind is None:
        kinds = SYNCS if field == "sync" else COMPRESSIONS
        raise StrategyError(
            f"{field}={name!r} is not known: {suggest(name, [k.__name__ for k in kinds])}"
        )
    try:
        return kind(*args, **named)
    except TypeError as error:
        takes = ", ".join(f.name for f in dataclasses.fields(kind))
        raise StrategyError(f"{field}={name}: {error}; it takes ({takes})") from error


def _whole(value: Any, name: str, least: int) -> None:
    given = getattr(value, name)
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise StrategyError(
            f"{type(value).__name__}({name}={given!r}) is not a whole number >= {least}"
        )


def _number(value: Any, name: str, least: float) -> None:
    given = getattr(value, name)
    ok = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    if not ok or given < least:
        raise StrategyError(f"{type(value).__name__}({name}={given!r}) is not a number >= {least}")


def _weighting(value: Any) -> None:
    if value.weighting not in ("examples", "equal"):
        raise StrategyError(
            f"{type(value).__name__}(weighting={value.weighting!r}) is not 'examples' or 'equal'"
        )


def _block(value: Any) -> None:
    _whole(value, "block_size", 8)
    if value.block_size % 8:
        raise StrategyError(
            f"{type(value).__name__}(block_size={value.block_size}) is not a multiple of 8"
        )
