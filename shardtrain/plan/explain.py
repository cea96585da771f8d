"""`plan.explain()`: which rule decided each array, and what each device holds."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import PartitionSpec

from shardtrain.errors import PartitionError, suggest
from shardtrain.partitioning import LeafPlan
from shardtrain.partitioning.infer.table import AxisTable
from shardtrain.partitioning.rules import as_axes
from shardtrain.plan.layout import Layout
from shardtrain.pytree import leaves_by_path, nbytes
from shardtrain.tables import Table, bytes_text


def explain_table(layout: Layout, zero: int, findings: tuple[str, ...]) -> Table:
    """One row per parameter and variable, replicated large ones first."""
    plans = [*layout.params.values(), *layout.variables.values()]
    stored = lambda p: p.spec(zero == 3) if p.path in layout.params else p.full
    plans.sort(key=lambda p: (any(stored(p)), 0 if any(stored(p)) else -p.nbytes))
    rows = tuple(
        (
            p.path,
            str(p.shape),
            _names(p.logical),
            spec_text(stored(p)),
            bytes_text(p.nbytes / shards(stored(p), layout.sizes)),
            p.rule,
            p.why,
        )
        for p in plans
    )
    held = device_bytes(layout.state.params)
    total = sum(p.nbytes for p in layout.params.values())
    notes = (
        f"parameters: {bytes_text(total)} in all, {bytes_text(held)} on each device; optimizer "
        f"state: {bytes_text(device_bytes(layout.state.opt_state))} on each device",
        *findings,
    )
    columns = ("parameter", "shape", "logical axes", "sharding", ">per device", "rule", "why")
    return Table("Where every array lives", columns, rows, notes)


def explain_leaf(
    layout: Layout, path: str, zero: int, axis_table: Callable[[], AxisTable] | None = None
) -> Table:
    """Everything decided about one parameter.

    Raises:
      PartitionError: There is no such path; the nearest is suggested.
    """
    plans: Mapping[str, LeafPlan] = {**layout.params, **layout.variables}
    if path not in plans:
        raise PartitionError(f"no parameter {path!r}: {suggest(path, plans)}")
    plan = plans[path]
    states = {
        p: leaf.sharding.spec
        for p, leaf in leaves_by_path(layout.state.opt_state).items()
        if p.endswith("/" + path) or p == path
    }
    rows = [
        ("shape, dtype", f"{plan.shape} {plan.dtype}"),
        ("logical axes", _names(plan.logical)),
        ("stored as", spec_text(plan.spec(zero == 3))),
        ("computed as", spec_text(plan.compute)),
        ("gradient", spec_text(plan.spec(zero >= 2))),
        *((f"optimizer {p}", spec_text(s)) for p, s in states.items()),
        ("rule", plan.rule),
        ("why", plan.why),
    ]
    table = axis_table() if axis_table is not None else None
    known = table is not None and any(row.path == path for row in table.rows)
    notes = (table.why(path),) if table is not None and known else ()
    return Table(path, ("", ""), tuple(rows), notes)


def shards(spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Into how many parts a spec cuts an array."""
    return math.prod(sizes[a] for entry in spec for a in as_axes(entry))


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded abstract arrays on one device."""
    total = 0
    for leaf in leaves_by_path(tree).values():
        whole = math.prod(leaf.shape)
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        total += nbytes(leaf) * part // whole if whole else 0
    return total


def spec_text(spec: PartitionSpec) -> str:
    """`P(None, 'tensor')`, or "replicated"."""
    if not any(spec):
        return "replicated"
    shown = ["None" if e is None else repr(e) for e in spec]
    return f"P({', '.join(shown)})"


def _names(logical: tuple[Any, ...]) -> str:
    if not any(logical):
        return "—"
    flat = ("·".join(as_axes(n)) if n is not None else "—" for n in logical)
    return ", ".join(flat)
