"""The choices the solver picks from: a group of classes, or two neighbours sharing an axis."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jax.sharding import PartitionSpec as P

from shardtrain.errors import PartitionError, suggest
from shardtrain.partitioning.infer.costs import Costs, Group, wildcard
from shardtrain.partitioning.infer.table import AxisTable


@dataclass(frozen=True)
class Option:
    """Shard `groups` over the whole mesh axis.

    Two groups mean a product: the first is split as far as its size, the second by the rest. That
    is a contiguous split of any dim that holds both side by side (query heads as kv heads times
    queries per kv head); dims with only one of them stay whole.
    """

    groups: tuple[int, ...]
    name: str
    flops: float
    param_bytes: float
    gathered: float
    label: str = ""  # the name with a parameter that has it

    def shards(self, dim: list[int]) -> bool:
        """Whether a dim made of these groups, major to minor, is sharded."""
        k = len(self.groups)
        return any(tuple(dim[i : i + k]) == self.groups for i in range(len(dim) - k + 1))


def options(
    table: AxisTable, costs: Costs, n: int, taken: frozenset[int], wanted: Mapping[str, str | None]
) -> list[Option]:
    """Every choice that divides.

    Groups in `taken` belong to another mesh axis; avoided groups are choices only when `wanted`.
    """
    if n == 1:
        return []
    found = [
        Option(
            (i,), g.name, g.flops, g.param_bytes, g.gathered, f"{g.name} ({wildcard(g.paths[0])})"
        )
        for i, g in enumerate(costs.groups)
        if g.size % n == 0 and i not in taken and _is_candidate(g, wanted)
    ]
    pairs = {(costs.group_of[a], costs.group_of[b]) for a, b in costs.products}
    for a, b in sorted(pairs):
        one, two = costs.groups[a], costs.groups[b]
        unfit = one.blocked or two.blocked or one.avoided or two.avoided
        if not unfit and _completes(one, two, n):
            found.append(_product(table, costs, a, b))
    return found


def _is_candidate(g: Group, wanted: Mapping[str, str | None]) -> bool:
    """It divides work, or rows of a table; or the user wants it."""
    if not g.paths or g.blocked:
        return False
    return wanted.get(g.name) == "tensor" or (not g.avoided and (g.flops > 0 or g.name == "vocab"))


def _label(g: Group) -> str:
    return f"{g.name} ({wildcard(g.paths[0])})"


def _completes(one: Group, two: Group, n: int) -> bool:
    """The major group is split completely, the minor one takes the rest of the axis."""
    ways = math.gcd(one.size, n)
    return one.size % n != 0 and ways == one.size and two.size % (n // ways) == 0


def _product(table: AxisTable, costs: Costs, a: int, b: int) -> Option:
    graph = table.graph
    flops = 0.0
    for c in graph.contractions:
        groups = {costs.group_of.get(r) for r in graph.atoms.roots(c.atoms)}
        flops += c.flops if {a, b} <= groups else 0.0
    held = sum(
        row.bytes
        for row in table.rows
        for dim in row.classes
        if (a, b) in pairwise(costs.group_of[c] for c in dim)
    )
    name = f"{costs.groups[a].name}*{costs.groups[b].name}"
    return Option((a, b), name, flops, held, costs.groups[a].gathered, name)


def fixed_choices(
    table: AxisTable, fixed: Mapping[str, Any]
) -> tuple[dict[str, str | None], dict[str, P]]:
    """Split the user's choices into logical axes and parameter globs.

    Returns:
      (logical axis → mesh axis or None, parameter path → spec).
    """
    names = set(table.names.values())
    paths = [row.path for row in table.rows]
    by_name: dict[str, str | None] = {}
    by_path: dict[str, P] = {}
    for key, value in fixed.items():
        matched = fnmatch.filter(paths, key)
        if key in names and (value is None or isinstance(value, str)):
            by_name[key] = value
        elif matched:
            by_path |= dict.fromkeys(matched, P() if value is None else P(*_entries(value)))
        else:
            hint = suggest(key, [*names, *paths])
            raise PartitionError(
                f"{key!r} is neither a logical axis of this model nor matches a parameter; {hint}"
            )
    return by_name, by_path


def _entries(spec: Any) -> tuple[Any, ...]:
    return (spec,) if isinstance(spec, str) else tuple(spec)
