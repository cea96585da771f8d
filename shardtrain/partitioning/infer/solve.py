"""Chooses which logical axes to shard over which mesh axes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import PartitionSpec as P

from shardtrain.errors import IndivisibleError, PartitionError
from shardtrain.partitioning.infer.costs import Costs, collect
from shardtrain.partitioning.infer.explain import explain_all
from shardtrain.partitioning.infer.options import Option, fixed_choices, options
from shardtrain.partitioning.infer.program import choose
from shardtrain.partitioning.infer.table import AxisTable

# Work that hides one byte of all-reduce on current chips: about 400 TFLOP/s over 300 GB/s.
TYPICAL_FLOPS_PER_BYTE = 1300.0


@dataclass(frozen=True)
class Solution:
    """A layout: specs over the given mesh axes, why, and what is left whole.

    `specs` has a `PartitionSpec` for every parameter path, `inputs` one for every input path.
    `predicted_bytes` is what the layout sends over `tensor` in one call of the traced program, in
    bytes per device for the traced batch; `runner_up` names the axes the next best layout shards.
    """

    specs: dict[str, P]
    inputs: dict[str, P]
    reasons: dict[str, str]
    findings: list[str]
    predicted_bytes: float
    flops_share: float
    sharded: dict[str, str]
    runner_up: tuple[str, ...] = ()


def solve(
    table: AxisTable,
    mesh_axes: Mapping[str, int],
    *,
    comm_weight: float = 1.0,
    fixed: Mapping[str, Any] | None = None,
    channels: bool = False,
) -> Solution:
    """Choose a layout over `tensor`, `expert` and `context` by a small integer program.

    Minimises work per device, bytes all-reduced (merged partial sums count once) and parameter
    bytes per device. Divisibility, and at most one dim of an array per mesh axis, are constraints.
    Classes that are the same dim of repeated layers are decided together.

    Args:
      table: from `infer_axes`.
      mesh_axes: mesh axis name → size; axes other than tensor, expert and context are ignored.
      comm_weight: above 1 shards less, below 1 more.
      fixed: logical axis name → mesh axis or None, or parameter glob → `PartitionSpec` or None
        (replicated); these win over what is inferred.
      channels: channels of convolutions may be sharded too.

    Returns:
      `Solution`.

    Raises:
      PartitionError: a key of `fixed` names no logical axis and no parameter.
      IndivisibleError: a fixed axis does not divide.
    """
    costs = collect(table, channels)
    n = mesh_axes.get("tensor", 1)
    by_name, by_path = fixed_choices(table, fixed or {})
    expert = _simple_axis(costs, "expert", mesh_axes.get("expert", 1), by_name)
    found = options(table, costs, n, expert, by_name)
    forced = _forced(found, costs, by_name, mesh_axes)
    chosen = choose(costs, found, n, comm_weight, forced) or []
    second = choose(costs, found, n, comm_weight, forced, forbid=chosen) if chosen else None
    specs = _specs(table, costs, chosen, expert, n) | by_path
    reasons, findings = explain_all(table, costs, chosen, expert, mesh_axes, specs, by_path)
    wanted = by_name.get("sequence", "context") == "context"
    context = mesh_axes.get("context", 1) if wanted else 1
    over = {o.name: "tensor" for o in chosen}
    solution = Solution(
        specs=specs,
        inputs=_inputs(table, context),
        reasons=reasons,
        findings=findings,
        predicted_bytes=_bytes(costs, chosen, n),
        flops_share=_flops_share(costs, chosen, n),
        sharded=over | {costs.groups[g].name: "expert" for g in expert},
        runner_up=tuple(o.label for o in second or ()),
    )
    return replace(solution, findings=[*findings, *_worth(costs, solution, n)])


def _simple_axis(
    costs: Costs, name: str, size: int, by_name: Mapping[str, str | None]
) -> frozenset[int]:
    """Groups of one name that divide a mesh axis of the same meaning."""
    if size <= 1:
        return frozenset()
    return frozenset(
        i
        for i, g in enumerate(costs.groups)
        if by_name.get(g.name, name if g.name == name else None) == name
        and g.size % size == 0
        and "two dims" not in g.blocked
    )


def _forced(
    found: list[Option],
    costs: Costs,
    by_name: Mapping[str, str | None],
    mesh_axes: Mapping[str, int],
) -> dict[int, int]:
    """Option → 0 or 1 where the user decided."""
    forced = {}
    for i, o in enumerate(found):
        names = {costs.groups[g].name for g in o.groups}
        wanted = [by_name[k] for k in names if k in by_name]
        if wanted:
            forced[i] = int(all(w == "tensor" for w in wanted) and len(wanted) == len(names))
    for name, axis in by_name.items():
        size = mesh_axes.get(axis, 1) if axis in ("tensor", "expert") else 1
        if size > 1:
            _check_wanted(costs, name, str(axis), size)
    return forced


def _check_wanted(costs: Costs, name: str, axis: str, n: int) -> None:
    """A wish that cannot be granted is an error, not a finding."""
    groups = [g for g in costs.groups if g.name == name and g.paths]
    where = f"({groups[0].paths[0]})" if groups else "(no parameter has it)"
    for g in groups:
        if g.size % n:
            raise IndivisibleError(
                f"{name} has {g.size} elements, not divisible by {axis}={n} {where}; drop the rule"
                " or choose a divisor"
            )
    if axis == "tensor" and (not groups or all(g.blocked for g in groups)):
        why = groups[0].blocked if groups else "it divides no parameter"
        raise PartitionError(f"{name} {where} cannot be sharded over {axis}={n}: {why}")


def _specs(
    table: AxisTable,
    costs: Costs,
    chosen: list[Option],
    expert: frozenset[int],
    n: int,
) -> dict[str, P]:
    specs = {}
    for row in table.rows:
        entries: list[str | None] = []
        for dim, size in zip(row.classes, row.shape, strict=True):
            groups = [costs.group_of[c] for c in dim]
            axis = "expert" if groups[:1] and groups[0] in expert else None
            if any(o.shards(groups) for o in chosen) and size % n == 0 and axis is None:
                axis = "tensor" if "tensor" not in entries else None
            entries.append(axis)
        while entries and entries[-1] is None:
            entries.pop()
        specs[row.path] = P(*entries)
    return specs


def _inputs(table: AxisTable, context: int) -> dict[str, P]:
    """Sequence dims of inputs over `context`."""
    specs = {}
    for row in table.inputs:
        entries = [
            "context" if axes[:1] == ("sequence",) and context > 1 and size % context == 0 else None
            for axes, size in zip(row.axes, row.shape, strict=True)
        ]
        if "context" in entries:  # one dim only: the first
            first = entries.index("context")
            entries = [*entries[:first], "context"]
        specs[row.path] = P(*entries) if "context" in entries else P()
    return specs


def _bytes(costs: Costs, chosen: list[Option], n: int) -> float:
    """Wire bytes per device over `tensor`: all-reduces, gathers and moves of cut dims."""
    groups = {g for o in chosen for g in o.groups}
    share = (n - 1) / n
    total = sum(2 * share * size for met, size in costs.reductions if met & groups)
    total += sum(share * o.gathered for o in chosen)
    for (a, b), size in costs.links.items():
        both = (a in groups) + (b in groups)
        total += size / n if both == 2 else share * size if both == 1 else 0.0
    return total


def _flops_share(costs: Costs, chosen: list[Option], n: int) -> float:
    """Contraction work per device as a share of all of it."""
    done = sum(o.flops for o in chosen)
    return 1.0 - (1 - 1 / n) * done / costs.total_flops if costs.total_flops else 1.0


def _worth(costs: Costs, solution: Solution, n: int) -> list[str]:
    """Advice when `tensor` does not pay."""
    if n == 1:
        return []
    if "tensor" not in solution.sharded.values():
        return [f"nothing shards over tensor={n}: tensor=1 with more data or fsdp is better"]
    if solution.flops_share > 1 - 0.2 * (n - 1) / n:
        done = round(100 * (1 - solution.flops_share) * n / (n - 1))
        return [
            f"only {done}% of the contraction work is divided by tensor={n}: tensor=1 with more"
            " data or fsdp is better"
        ]
    saved = (1 - solution.flops_share) * costs.total_flops
    if solution.predicted_bytes * TYPICAL_FLOPS_PER_BYTE > saved:
        return [
            f"at these sizes tensor={n} sends {solution.predicted_bytes / 1e6:.1f} MB to save"
            f" {saved / 1e9:.2f} GFLOP on each device: tensor=1 is likely faster"
        ]
    return []
