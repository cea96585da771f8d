"""The small integer program behind `solve`."""

from collections.abc import Mapping

import numpy as np

from shardtrain.errors import PartitionError
from shardtrain.partitioning.infer.costs import Costs
from shardtrain.partitioning.infer.options import Option

# How much a byte on the wire weighs against the work it saves. The unit is the model's own mean
# flops per byte of contraction results, so the same structure is found at every width.
FLOPS_PER_BYTE_SHARE = 0.25
# Weight of the parameter bytes saved per device, as a share of the work saved.
MEMORY_SHARE = 0.5


def choose(
    costs: Costs,
    found: list[Option],
    n: int,
    comm_weight: float,
    forced: Mapping[int, int],
    forbid: list[Option] | None = None,
) -> list[Option] | None:
    """Solve the integer program with HiGHS.

    Args:
      costs: coefficients from `collect`.
      found: the options.
      n: size of the mesh axis.
      comm_weight: weight of bytes sent against work and memory saved.
      forced: option index → 0 or 1 where the user decided.
      forbid: a known solution to exclude (for the runner-up).

    Returns:
      The chosen options; None when nothing satisfies `forced` and `forbid`.

    Raises:
      PartitionError: the fixed axes contradict each other.
    """
    if not found or n == 1:
        return []
    # Imported here: scipy.optimize takes as long to import as JAX, and most plans have no choice.
    from scipy.optimize import Bounds, LinearConstraint, milp

    program = _Program(costs, found, n, comm_weight)
    rows = [LinearConstraint(np.array(program.rows), -np.inf, np.array(program.upper))]
    if forbid is not None:
        row = np.zeros(program.width)
        for i, o in enumerate(found):
            row[i] = 1 if o in forbid else -1
        rows.append(LinearConstraint(row, -np.inf, len(forbid) - 1))
    low, high = np.zeros(program.width), np.ones(program.width)
    for i, value in forced.items():
        low[i] = high[i] = value
    integral = np.zeros(program.width)
    integral[: len(found)] = 1
    result = milp(program.cost, integrality=integral, bounds=Bounds(low, high), constraints=rows)
    if result.x is None and forbid is None:
        raise PartitionError(
            f"no layout over tensor={n} satisfies the fixed axes: two of them meet in one array"
        )
    if result.x is None:
        return None
    return [o for i, o in enumerate(found) if result.x[i] > 0.5]


class _Program:
    """Matrices of the integer program: one column per option, all-reduce and link."""

    def __init__(self, costs: Costs, found: list[Option], n: int, comm_weight: float) -> None:
        share = (n - 1) / n
        rate = FLOPS_PER_BYTE_SHARE * costs.total_flops / max(costs.contraction_bytes, 1.0)
        work = costs.total_flops / max(rate, 1e-9)  # all work, in bytes
        memory = MEMORY_SHARE * work / max(costs.param_bytes, 1.0)
        uses = _uses(found)
        reductions: dict[frozenset[int], float] = {}
        for groups, size in costs.reductions:
            key = frozenset(i for g in groups for i in uses.get(g, ()))
            if key:
                reductions[key] = reductions.get(key, 0.0) + size
        self.width = len(found) + len(reductions) + len(costs.links)
        self.cost = np.zeros(self.width)
        self.rows: list[np.ndarray] = [np.zeros(self.width)]
        self.upper: list[float] = [0.0]
        for i, o in enumerate(found):
            self.cost[i] = -share * (o.flops / max(rate, 1e-9) + memory * o.param_bytes)
            self.cost[i] += comm_weight * share * o.gathered
        column = len(found)
        for members, size in reductions.items():
            self.cost[column] = comm_weight * 2 * share * size
            for i in members:
                self._row({i: 1, column: -1}, 0)
            column += 1
        for (a, b), size in costs.links.items():
            one, two = uses.get(a, ()), uses.get(b, ())
            for i in (*one, *two):
                self.cost[i] += comm_weight * size / n / 2
            self.cost[column] = comm_weight * size * (share - 0.5 / n)
            self._row({**dict.fromkeys(one, 1), **dict.fromkeys(two, -1), column: -1}, 0)
            self._row({**dict.fromkeys(two, 1), **dict.fromkeys(one, -1), column: -1}, 0)
            column += 1
        for i, o in enumerate(found):
            if o.name.startswith("fused_"):  # not without any of its pieces
                ends = {b for pair in costs.links for b in pair if o.groups[0] in pair}
                pieces = {j for g in ends - set(o.groups) for j in uses.get(g, ())}
                self._row({i: 1, **dict.fromkeys(pieces, -1)}, 0)
        for met in costs.exclusive:
            members = {i for g in met for i in uses.get(g, ())}
            if len(members) > 1:
                self._row(dict.fromkeys(members, 1), 1)

    def _row(self, entries: Mapping[int, float], upper: float) -> None:
        row = np.zeros(self.width)
        for i, value in entries.items():
            row[i] = value
        self.rows.append(row)
        self.upper.append(upper)


def _uses(found: list[Option]) -> dict[int, list[int]]:
    uses: dict[int, list[int]] = {}
    for i, o in enumerate(found):
        for g in o.groups:
            uses.setdefault(g, []).append(i)
    return uses
