"""Sentences: why each parameter is sharded as it is, and what is left whole."""

from collections.abc import Mapping

from jax.sharding import PartitionSpec as P

from shardtrain.partitioning.infer.costs import Costs, Group, wildcard
from shardtrain.partitioning.infer.options import Option
from shardtrain.partitioning.infer.table import AxisRow, AxisTable, owners_of

_ROLES = {"column": "column-parallel", "row": "row-parallel", "vocab": "split by rows of the table"}
# Names a reader would look for when they are not sharded.
_EXPECTED = ("vocab", "heads", "kv_heads", "mlp", "classes", "expert")


def explain_all(
    table: AxisTable,
    costs: Costs,
    chosen: list[Option],
    expert: frozenset[int],
    mesh_axes: Mapping[str, int],
    specs: Mapping[str, P],
    fixed: Mapping[str, P],
) -> tuple[dict[str, str], list[str]]:
    """Reasons per parameter path, and findings about what is not sharded."""
    n = mesh_axes.get("tensor", 1)
    roles = _roles(table)
    reduced = _reduced(costs)
    reasons = {}
    for row in table.rows:
        if row.path in fixed:
            reasons[row.path] = "fixed by a rule"
        elif "tensor" in tuple(specs[row.path]):
            reasons[row.path] = _sharded(table, costs, row, chosen, roles, reduced, n)
        elif "expert" in tuple(specs[row.path]):
            reasons[row.path] = f"expert: split over expert={mesh_axes['expert']}"
        else:
            reasons[row.path] = _whole(costs, row, n)
    return reasons, _findings(table, costs, chosen, expert, mesh_axes)


def _roles(table: AxisTable) -> dict[tuple[str, int], str]:
    """(path, class) → column, row or vocab, from the forward contractions with weights."""
    atoms = table.graph.atoms
    owners = owners_of(table.graph, table.leaves)
    roles: dict[tuple[str, int], str] = {}
    for c in table.graph.contractions:
        for role, side in zip(("row", "column"), c.weight or (), strict=False):
            for atom in atoms.leaves(side):
                if atom in owners:
                    # The backward pass uses the same weights the other way round: forward is first.
                    roles.setdefault((owners[atom][0], atoms.find(atom)), role)
    for dim, of_data, _ in table.graph.indexed:
        for r in atoms.roots(dim):
            for row in table.rows:
                if not of_data and row.classes and r in row.classes[0]:
                    roles[row.path, r] = "vocab"
    return roles


def _reduced(costs: Costs) -> dict[int, tuple[int, float]]:
    """Group → (number of all-reduces of its partial sums, bytes)."""
    out: dict[int, tuple[int, float]] = {}
    for met, size in costs.reductions:
        for g in met:
            count, total = out.get(g, (0, 0.0))
            out[g] = (count + 1, total + size)
    return out


def _sharded(
    table: AxisTable,
    costs: Costs,
    row: AxisRow,
    chosen: list[Option],
    roles: Mapping[tuple[str, int], str],
    reduced: Mapping[int, tuple[int, float]],
    n: int,
) -> str:
    groups = [[costs.group_of[c] for c in dim] for dim in row.classes]
    option, axis = next((o, a) for o in chosen for a, dim in enumerate(groups) if o.shards(dim))
    mine = {c for c in row.classes[axis] if costs.group_of[c] in option.groups}
    saved = f"saves {_size(row.bytes * (n - 1) / n)} per device"
    role = next((roles[row.path, c] for c in mine if (row.path, c) in roles), None)
    if role is None:
        return f"{option.name}: follows the axis; {saved}"
    other = "row" if role == "column" else "column"
    partners = sorted({wildcard(p) for (p, c), r in roles.items() if c in mine and r == other})
    text = f"{option.name}: {_ROLES[role]}"
    if partners and role != "vocab":
        text += f", with {', '.join(partners[:3])} as its {_ROLES[other]} partner"
        text += "s" if len(partners) > 1 else ""
    count, size = reduced.get(option.groups[0], (0, 0.0))
    if role in ("row", "vocab") and count:
        text += f"; partial sums of this axis cost {count} all-reduces of {_size(size)} in all"
    return f"{text}; {saved}"


def _whole(costs: Costs, row: AxisRow, n: int) -> str:
    """Why no dim of this parameter is sharded."""
    if n == 1:
        return "whole: there is no tensor axis"
    parts = []
    for names, dim in zip(row.axes, row.classes, strict=True):
        for name, c in zip(names, dim, strict=True):
            g = costs.groups[costs.group_of[c]]
            parts.append(f"{name} ({_why_not(g, n)})")
    return "whole: " + ("; ".join(parts) if parts else "a scalar")


def _why_not(g: Group, n: int) -> str:
    if g.blocked:
        return g.blocked
    if g.size % n and not g.avoided:
        return f"{g.size} is not divisible by tensor={n}"
    if g.avoided:
        return g.avoided
    return "sharding it would send more than it saves"


def _findings(
    table: AxisTable,
    costs: Costs,
    chosen: list[Option],
    expert: frozenset[int],
    mesh_axes: Mapping[str, int],
) -> list[str]:
    n = mesh_axes.get("tensor", 1)
    out = [f"no axis crosses the unknown primitive {o}" for o in table.opaque]
    sharded = {g for o in chosen for g in o.groups}
    for o in chosen:
        if len(o.groups) == 2:
            major = costs.groups[o.groups[0]]
            out.append(
                f"{major.name}={major.size} < tensor={n}: parameters with {major.name} alone"
                f" (key and value projections) are replicated over tensor; {o.name} is sharded"
            )
        out.extend(_fused(table, costs, o, n))
    if n > 1:
        out.extend(_unsharded(costs, sharded | expert, n))
    size = mesh_axes.get("expert", 1)
    if size > 1 and not expert:
        sizes = sorted({g.size for g in costs.groups if g.name == "expert"})
        why = f"{sizes} experts do not divide by it" if sizes else "the model has no expert axis"
        out.append(f"expert={size} shards nothing: {why}")
    out.extend(_context(table, mesh_axes.get("context", 1)))
    return list(dict.fromkeys(out))


def _context(table: AxisTable, n: int) -> list[str]:
    """Sequence dims that `context` cannot split."""
    if n == 1:
        return []
    found = [
        (row.path, size)
        for row in table.inputs
        for axes, size in zip(row.axes, row.shape, strict=True)
        if axes[:1] == ("sequence",)
    ]
    if not found:
        return [f"context={n} shards nothing: no input has a sequence dim"]
    return [
        f"input {path or 'batch'}: its sequence of {size} is not divisible by context={n} and"
        " stays whole"
        for path, size in found
        if size % n
    ]


def _fused(table: AxisTable, costs: Costs, option: Option, n: int) -> list[str]:
    """Dims that hold several projections side by side, sharded across their borders."""
    out = []
    for row in table.rows:
        for dim, names in zip(row.classes, row.axes, strict=True):
            groups = [costs.group_of[c] for c in dim]
            if option.shards(groups) and groups[: len(option.groups)] != list(option.groups):
                out.append(
                    f"{wildcard(row.path)}: {option.name} is not the major factor of the fused dim"
                    f" ({'*'.join(names)}); it is sharded across the border over tensor={n}, and"
                    " activations are moved between devices after the product"
                )
    if option.name.startswith("fused_"):
        paths = sorted({wildcard(p) for p in costs.groups[option.groups[0]].paths})
        out.append(
            f"{', '.join(paths[:3])}: one dim fuses several projections; it is sharded in"
            f" contiguous blocks over tensor={n}, and the pieces are moved between devices after"
            " the product (separate projections would not need that)"
        )
    return out


def _unsharded(costs: Costs, sharded: frozenset[int] | set[int], n: int) -> list[str]:
    out = []
    for i, g in enumerate(costs.groups):
        plain = g.name.removeprefix("fused_").split("_2")[0]
        if i in sharded or plain not in _EXPECTED or (not g.paths and not g.blocked):
            continue
        path = wildcard(g.paths[0]) if g.paths else "several parameters"
        if g.blocked:
            out.append(f"{g.name} ({path}) is not sharded: {g.blocked}")
        elif g.size % n:
            out.append(
                f"{g.name} has {g.size} elements, not divisible by tensor={n}: {path} stays whole"
                " on that dim"
            )
    return out


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    return ""
