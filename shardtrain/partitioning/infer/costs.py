"""What sharding each class over an axis would save and cost: the coefficients of the MILP."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import jax.numpy as jnp

from shardtrain.partitioning.infer.table import AxisTable

# Axes that divide but are not worth it: sharded only when the user asks.
_AVOIDED = {
    "embed": "the residual stream: sharding it would all-reduce every projection",
    "head_dim": "splitting a head would all-reduce attention scores",
    "position": "a table of positions is small",
    "router": "experts are ranked together",
}
_OUTERMOST_INDEX = re.compile(r"(^|/|_)\d+(?=/|_|$)")


def wildcard(path: str) -> str:
    """A path with its outermost index replaced by `*`: repeated layers share it."""
    return _OUTERMOST_INDEX.sub(r"\1*", path, count=1)


@dataclass
class Group:
    """Classes decided together: the same dim of repeated layers."""

    classes: tuple[int, ...]
    name: str
    size: int
    blocked: str = ""  # why it can never be sharded
    avoided: str = ""  # why it is only sharded when the user asks
    flops: float = 0.0  # of contractions it divides
    param_bytes: float = 0.0  # of parameters it divides
    gathered: float = 0.0  # bytes gathered for operations that need it whole
    paths: list[str] = field(default_factory=list)


@dataclass
class Costs:
    """Coefficients: groups, all-reduces shared between groups, links, and exclusions."""

    groups: list[Group]
    group_of: dict[int, int]  # class → index into groups
    reductions: list[tuple[frozenset[int], float]]  # groups whose sharding needs it, bytes
    links: dict[tuple[int, int], float]
    exclusive: set[frozenset[int]]  # groups that meet in one array
    total_flops: float
    contraction_bytes: float
    param_bytes: float
    products: list[tuple[int, int]]  # (major, minor) neighbours within one dim of a parameter


def collect(table: AxisTable, channels: bool = False) -> Costs:
    """Sum up the trace per group of tied classes.

    Args:
      table: from `infer_axes`.
      channels: channels of convolutions are choices too.
    """
    graph, roots = table.graph, table.graph.atoms.roots
    arrays = _distinct_arrays(table)
    blocked = _blocked(table, arrays)
    groups, group_of = _groups(table, arrays, blocked)
    if not channels:
        _avoid_convolutions(table, groups, group_of)
    candidates = {c for c, g in group_of.items() if not groups[g].blocked}

    def groups_of(classes: Iterable[int]) -> frozenset[int]:
        return frozenset(group_of[c] for c in classes if c in candidates)

    for c in graph.contractions:
        for g in groups_of(roots(c.atoms)):
            groups[g].flops += c.flops
    for row in table.rows:
        for g in {group_of[c] for dim in row.classes for c in dim}:
            groups[g].param_bytes += row.bytes
            groups[g].paths.append(row.path)
    for penalty in graph.penalties:
        for g in groups_of(roots(penalty.atoms)):
            groups[g].gathered += penalty.bytes
    for dims, size in arrays.items():
        minor = {c for dim in dims for c in dim[1:]}
        for g in groups_of(minor):
            groups[g].gathered += size
    links: dict[tuple[int, int], float] = defaultdict(float)
    for link in graph.links:
        for a in groups_of(roots(link.whole)[:1]):
            for b in groups_of(roots(link.part)[:1]):
                if a != b:
                    links[min(a, b), max(a, b)] += link.bytes
    return Costs(
        groups=groups,
        group_of=group_of,
        reductions=[
            (found, p.bytes)
            for p in graph.partials
            if not p.merged and (found := groups_of(r for term in p.terms for r in roots(term)))
        ],
        links=dict(links),
        exclusive={
            met for dims in arrays if len(met := groups_of(c for dim in dims for c in dim)) > 1
        },
        total_flops=sum(c.flops for c in graph.contractions),
        contraction_bytes=sum(c.out_bytes for c in graph.contractions),
        param_bytes=sum(row.bytes for row in table.rows),
        products=sorted(
            {pair for row in table.rows for dim in row.classes for pair in pairwise(dim)}
        ),
    )


def _distinct_arrays(table: AxisTable) -> dict[tuple[tuple[int, ...], ...], float]:
    """Dims of all arrays, each pattern once, with the bytes of the largest such array."""
    roots, raw = table.graph.atoms.roots, {}
    for dims, size in table.graph.arrays:
        key = tuple(map(tuple, dims))
        raw[key] = max(size, raw.get(key, 0.0))
    arrays: dict[tuple[tuple[int, ...], ...], float] = {}
    for dims, size in raw.items():
        key = tuple(map(roots, dims))
        arrays[key] = max(size, arrays.get(key, 0.0))
    return arrays


def _blocked(table: AxisTable, arrays: Iterable[tuple[tuple[int, ...], ...]]) -> dict[int, str]:
    """Classes that cannot be sharded at all, with the reason."""
    atoms = table.graph.atoms
    blocked = {r: why for atom, why in atoms.blocked.items() for r in atoms.roots([atom])}
    for dims in arrays:
        flat = [c for dim in dims for c in dim]
        for c in flat:
            if flat.count(c) > 1:
                blocked.setdefault(c, "two dims of one array are this axis")
    for row in table.inputs:
        keep = 1 if len(row.shape) > 1 and row.shape[-1] > 1 and _is_float(table, row.path) else 0
        for dim in row.classes[: len(row.classes) - keep]:
            for c in dim:
                blocked.setdefault(c, "a batch or sequence dim of the inputs")
    return blocked


def _is_float(table: AxisTable, path: str) -> bool:
    return any(p == path and jnp.issubdtype(a.dtype, jnp.floating) for p, a, _ in table.leaves)


def _groups(
    table: AxisTable, arrays: Iterable[tuple[tuple[int, ...], ...]], blocked: dict[int, str]
) -> tuple[list[Group], dict[int, int]]:
    """Tie classes that are the same dim of repeated layers, unless they meet in one array."""
    parent: dict[int, int] = {}

    def find(c: int) -> int:
        while parent.setdefault(c, c) != c:
            c = parent[c]
        return c

    seen: dict[tuple, int] = {}
    for row in table.rows:
        for axis, dim in enumerate(row.classes):
            for place, c in enumerate(dim):
                key = (wildcard(row.path), axis, place, table.size(c))
                parent[find(c)] = find(seen.setdefault(key, c))
    clash = set()
    for dims in arrays:
        met: dict[int, int] = {}
        for c in {c for dim in dims for c in dim if c in parent}:
            if met.setdefault(find(c), c) != c:
                clash.add(find(c))
    groups: list[Group] = []
    group_of: dict[int, int] = {}
    by_key: dict[int, int] = {}
    for c in sorted(parent):
        key = c if find(c) in clash else -1 - find(c)
        g = by_key.setdefault(key, len(groups))
        if g == len(groups):
            groups.append(Group((), table.names[c], table.size(c)))
        group_of[c] = g
        groups[g].classes = (*groups[g].classes, c)
        groups[g].blocked = groups[g].blocked or blocked.get(c, "")
        groups[g].avoided = groups[g].avoided or _AVOIDED.get(table.names[c], "")
    return groups, group_of


def _avoid_convolutions(table: AxisTable, groups: list[Group], group_of: dict[int, int]) -> None:
    """Feature maps are large and kernels small: channels are not worth an all-reduce each."""
    roots = table.graph.atoms.roots
    for c in table.graph.contractions:
        if c.kind == "conv":
            for r in roots([a for side in c.weight or () for a in side]):
                if r in group_of and not groups[group_of[r]].avoided:
                    groups[group_of[r]].avoided = "channels of a convolution"
