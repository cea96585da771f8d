"""One decision per array: its PartitionSpec, and why.

Design: three specs per parameter. `compute` names the axes that split the computation (tensor,
expert); `full` adds `fsdp` on one more dim. ZeRO levels only say which of the two the stored
parameters, the gradients and the optimizer state use.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from shardtrain.errors import DoubleAxisError, IndivisibleError, PartitionError, ReplicationError
from shardtrain.partitioning.rules import AMBIGUOUS, as_axes, axes_of, glob_rule
from shardtrain.pytree import leaves_by_path, matches, nbytes
from shardtrain.strategy import Strategy

Entries = tuple[tuple[str, ...], ...]

REPLICATED_SHARE = 0.25
"""Share of all parameter bytes that may stay on every device without being named."""


@dataclass(frozen=True)
class LeafPlan:
    """How one array is laid out.

    Args:
      path: Where it is in the tree.
      shape: Its global shape.
      dtype: Its dtype.
      logical: Logical axis name per dim, or None.
      compute: Spec that the computation sees (no fsdp).
      full: `compute` plus fsdp.
      rule: What decided: "rule", "annotation", "inferred", "fsdp" or "replicated".
      why: One sentence.
      nbytes: Bytes of the whole array.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    logical: tuple[Any, ...]
    compute: PartitionSpec
    full: PartitionSpec
    rule: str
    why: str
    nbytes: int

    def spec(self, sharded: bool) -> PartitionSpec:
        """`full` where this kind of array is sharded over fsdp, else `compute`."""
        return self.full if sharded else self.compute


@dataclass(frozen=True)
class Inferred:
    """What axis inference says of one array: mesh axes per dim, names per dim, and why."""

    spec: PartitionSpec
    logical: tuple[Any, ...]
    why: str


def partition_tree(
    tree: Any,
    strategy: Strategy,
    sizes: Mapping[str, int],
    annotations: Mapping[str, tuple[Any, ...]] | None = None,
    inferred: Mapping[str, Inferred] | None = None,
    prefix: str = "",
) -> dict[str, LeafPlan]:
    """Decide every leaf of a tree: rules, then annotations, then inference, then FSDP.

    Args:
      tree: Abstract arrays.
      strategy: Rules and ZeRO level.
      sizes: Mesh axis sizes.
      annotations: Path -> the author's logical axis names.
      inferred: Path -> inferred layout over tensor and expert.
      prefix: Prepended to paths when matching rules.

    Raises:
      PartitionError: A dim is indivisible, an axis is used twice, a name is unknown.
    """
    annotations, inferred = annotations or {}, inferred or {}
    plans = {}
    for path, leaf in leaves_by_path(tree).items():
        names = annotations.get(path, (None,) * len(leaf.shape))
        found = _decide(prefix + path, leaf, names, inferred.get(path), strategy, sizes)
        plans[path] = found
    return plans


def _decide(
    path: str,
    leaf: Any,
    names: tuple[Any, ...],
    inferred: Inferred | None,
    strategy: Strategy,
    sizes: Mapping[str, int],
) -> LeafPlan:
    shape = tuple(leaf.shape)
    glob = glob_rule(path, strategy.rules)
    final = False
    if glob is not None:
        entries = _rule_entries(path, shape, *glob)
        rule, why, final = "rule", f"rules[{glob[0]!r}]", True
    elif any(n is not None for n in names):
        entries, why = _named_entries(path, shape, names, strategy, sizes)
        rule = "annotation"
        if inferred is not None and _undecided(names, entries, strategy):
            entries = _entries(inferred.spec, len(shape))
            rule, why = "inferred", f"{inferred.why} (annotation {names} leads to no mesh axis)"
    elif inferred is not None:
        entries = _entries(inferred.spec, len(shape))
        rule, why, names = "inferred", inferred.why, inferred.logical
    else:
        entries, rule, why = ((),) * len(shape), "replicated", "no rule, annotation or shared axis"
    entries = tuple(tuple(a for a in dim if sizes[a] > 1) for dim in entries)
    _check(path, shape, entries, names, sizes)
    compute = tuple(tuple(a for a in dim if a != "fsdp") for dim in entries)
    full = entries
    if not final and sizes["fsdp"] > 1 and not any("fsdp" in dim for dim in entries):
        full, fsdp_why = _add_fsdp(shape, entries, names, sizes)
        if full != entries:
            rule = "fsdp" if rule == "replicated" else rule
            why = fsdp_why if rule == "fsdp" else f"{why}; {fsdp_why}"
        elif rule == "replicated":
            why = fsdp_why
    if sizes["fsdp"] == 1 and rule == "replicated" and not shape:
        why = "a scalar"
    return LeafPlan(
        path=path,
        shape=shape,
        dtype=leaf.dtype,
        logical=tuple(names) if names else (None,) * len(shape),
        compute=_spec(compute),
        full=_spec(full),
        rule=rule,
        why=why,
        nbytes=nbytes(leaf),
    )


def _undecided(names: tuple[Any, ...], entries: Entries, strategy: Strategy) -> bool:
    """An annotation with an ambiguous name that shards nothing and that no rule speaks of."""
    parts = {part for name in names for part in as_axes(name)}
    return bool(parts & AMBIGUOUS) and not any(entries) and not parts & set(strategy.rules)


def _rule_entries(path: str, shape: tuple[int, ...], glob: str, value: tuple[Any, ...]) -> Entries:
    if len(value) > len(shape):
        raise PartitionError(
            f"rule {glob!r} gives {len(value)} entries, but {path} has {len(shape)} dims {shape}"
        )
    return tuple(as_axes(v) for v in value) + ((),) * (len(shape) - len(value))


def _named_entries(
    path: str,
    shape: tuple[int, ...],
    names: tuple[Any, ...],
    strategy: Strategy,
    sizes: Mapping[str, int],
) -> tuple[Entries, str]:
    """Mesh axes of an author's annotation; a dim may hold a name, several, or None."""
    entries, reasons = [], []
    for name in names:
        dim: list[str] = []
        for part in as_axes(name):
            axes, reason = axes_of(part, strategy.rules, path)
            dim.extend(axes)
            if any(sizes[a] > 1 for a in axes):
                reasons.append(f"{reason} → {', '.join(axes)}")
        entries.append(tuple(dim))
    if len(entries) != len(shape):
        raise PartitionError(f"{path}: annotation {names} does not fit its shape {shape}")
    return tuple(entries), "; ".join(reasons) or f"annotation {names}: no axis to shard over"


def _check(
    path: str,
    shape: tuple[int, ...],
    entries: Entries,
    names: tuple[Any, ...],
    sizes: Mapping[str, int],
) -> None:
    seen: dict[str, int] = {}
    for dim, axes in enumerate(entries):
        for axis in axes:
            if axis in seen:
                raise DoubleAxisError(
                    f"{path} {shape}: mesh axis {axis!r} would shard both dim {seen[axis]} and dim "
                    f"{dim} (logical axes {names}); an axis can shard one dim of an array. Send "
                    "one of them elsewhere with Strategy(rules={...: None})"
                )
            seen[axis] = dim
        parts = math.prod(sizes[a] for a in axes)
        if shape[dim] % parts:
            raise IndivisibleError(_indivisible(path, shape, dim, names, axes, sizes))


def _indivisible(
    path: str,
    shape: tuple[int, ...],
    dim: int,
    names: tuple[Any, ...],
    axes: tuple[str, ...],
    sizes: Mapping[str, int],
) -> str:
    size, parts = shape[dim], math.prod(sizes[a] for a in axes)
    name = names[dim] if dim < len(names) and names[dim] is not None else "unnamed"
    asked = " x ".join(f"{a}={sizes[a]}" for a in axes)
    works = [d for d in range(1, min(size, 4 * parts) + 1) if size % d == 0]
    padded = -(-size // parts) * parts
    key = name if isinstance(name, str) and name != "unnamed" else path
    value = "None" if key == name else "()"
    return (
        f"{path} {shape}: dim {dim} ({name}) = {size} is not divisible by {asked}. Works with "
        f"{'x'.join(axes)} in {{{', '.join(map(str, works))}}}; or make the dim {padded}; or keep "
        f"it whole: Strategy(rules={{{key!r}: {value}}})"
    )


def _add_fsdp(
    shape: tuple[int, ...], entries: Entries, names: tuple[Any, ...], sizes: Mapping[str, int]
) -> tuple[Entries, str]:
    """FSDP on the largest dim that divides; a free dim before an already sharded one."""
    fsdp = sizes["fsdp"]
    best: tuple[bool, bool, int, int] | None = None
    for dim, axes in enumerate(entries):
        parts = math.prod(sizes[a] for a in axes)
        if shape[dim] % (parts * fsdp) == 0 and shape[dim] > 0:
            stacked = dim < len(names) and names[dim] in ("layers", "layer", "stack")
            rank = (not stacked, not axes, shape[dim] // parts, -dim)
            if best is None or rank > best:
                best = rank
    if best is None:
        if not shape:
            return entries, "a scalar"
        return entries, f"no dim of {shape} is divisible by fsdp={fsdp}"
    dim = -best[3]
    new = tuple((*axes, "fsdp") if d == dim else axes for d, axes in enumerate(entries))
    return new, f"fsdp={fsdp} on dim {dim} (largest divisible: {shape[dim]})"


def check_replication(plans: Mapping[str, LeafPlan], strategy: Strategy, sizes: Mapping) -> None:
    """Large parameters are not silently on every device.

    Raises:
      ReplicationError: More than a quarter of all bytes is, and was not allowed by name.
    """
    meant = {a: sizes[a] for a in ("tensor", "expert") if sizes[a] > 1}
    if strategy.zero == 3 and sizes["fsdp"] > 1:
        meant["fsdp"] = sizes["fsdp"]
    if not meant:
        return
    whole = [p for p in plans.values() if not any(p.spec(strategy.zero == 3))]
    # A rule that says so, or a name the user sent to None, is a decision, not silence.
    silent = [p for p in whole if p.rule != "rule" and not _allowed(p, strategy)]
    total = sum(p.nbytes for p in plans.values())
    share = sum(p.nbytes for p in silent) / max(total, 1)
    if share <= REPLICATED_SHARE:
        return
    silent.sort(key=lambda p: -p.nbytes)
    rows = "\n".join(
        f"  {p.path} {p.shape} {p.dtype}, {p.nbytes:,} bytes on each device: {p.why}"
        for p in silent[:5]
    )
    asked = ", ".join(f"{a}={n}" for a, n in meant.items())
    raise ReplicationError(
        f"{len(silent)} of {len(plans)} parameters ({share:.0%} of bytes) are fully replicated on "
        f"a mesh with {asked}:\n{rows}\nFix: axis sizes that divide these dims (or no such axis: "
        f"{' or '.join(f'{a}=1' for a in meant)}), Strategy(rules={{'<path glob>': (axes per "
        f"dim)}}), or accept it with Strategy(allow_replicated=({silent[0].path!r},)) — globs "
        "work, '**' accepts all"
    )


def _allowed(plan: LeafPlan, strategy: Strategy) -> bool:
    by_path = any(matches(plan.path, glob) for glob in strategy.allow_replicated)
    by_name = any(n in strategy.rules and strategy.rules[n] is None for n in plan.logical if n)
    return by_path or by_name


def _entries(spec: PartitionSpec, rank: int) -> Entries:
    entries = tuple(as_axes(e) for e in spec)
    return entries + ((),) * (rank - len(entries))


def _spec(entries: Entries) -> PartitionSpec:
    """Canonical form: one name as a string, trailing None dropped."""
    listed: list[Any] = [None if not e else (e[0] if len(e) == 1 else e) for e in entries]
    while listed and listed[-1] is None:
        listed.pop()
    return PartitionSpec(*listed)
