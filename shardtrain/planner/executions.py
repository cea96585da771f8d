"""How often each computation of an HLO program runs in one step, and in what circumstances."""

from dataclasses import dataclass

from shardtrain.planner.hlo import Computation, Instruction, Module
from shardtrain.planner.trip_counts import TripCounts


@dataclass(frozen=True)
class Execution:
    """Runs of one computation in one step.

    Attributes:
        count: runs, loop trip counts multiplied out, all call sites added.
        is_exact: False inside a data-dependent loop (counted as one pass) or the branch of a
            conditional (counted as taken).
        in_loop: some call site is inside a loop.
        is_async: it is the body of an `async-start`.
        fused_by: the fusion or async instruction that runs it; its metadata stands in for missing.
    """

    count: int = 0
    is_exact: bool = True
    in_loop: bool = False
    is_async: bool = False
    fused_by: Instruction | None = None

    def plus(self, other: "Execution") -> "Execution":
        """Both call sites together."""
        return Execution(
            self.count + other.count,
            self.is_exact and other.is_exact,
            self.in_loop or other.in_loop,
            self.is_async or other.is_async,
            self.fused_by or other.fused_by,
        )


def _calls(
    trips: TripCounts, computation: Computation, node: Instruction, at: Execution
) -> list[tuple[str, Execution]]:
    """Computations an instruction runs, and how often; reducers (`to_apply`) are left out."""
    if node.opcode == "while":
        count = trips.of(computation, node)
        exact = at.is_exact and count is not None
        passes = 1 if count is None else count
        return [
            (node.callees["body"][0], Execution(at.count * passes, exact, True)),
            (node.callees["condition"][0], Execution(at.count * (passes + 1), exact, True)),
        ]
    if node.opcode == "conditional":
        branch = Execution(at.count, False, at.in_loop)
        return [(name, branch) for name in node.callees.get("branches", ())]
    if node.opcode == "call":
        names = node.callees.get("to_apply", ()) + node.callees.get("calls", ())
        return [(name, Execution(at.count, at.is_exact, at.in_loop)) for name in names]
    if node.opcode in ("fusion", "async-start", "custom-call"):
        is_async = at.is_async or node.opcode == "async-start"
        inner = Execution(at.count, at.is_exact, at.in_loop, is_async, node)
        names = node.callees.get("calls", ()) + node.callees.get("branches", ())
        return [(name, inner) for name in names]
    return []


def count_executions(module: Module) -> dict[str, Execution]:
    """Runs of every computation that one step reaches.

    HLO prints callees before callers, so one pass from the last computation to the first has every
    caller's count ready before its callees need it.
    """
    trips = TripCounts(module)
    found = {module.entry: Execution(1)}
    for name in reversed(module.computations):
        at = found.get(name)
        if at is None:
            continue
        computation = module.computations[name]
        for node in computation.instructions:
            for callee, execution in _calls(trips, computation, node, at) if node.callees else ():
                found[callee] = found.get(callee, Execution()).plus(execution)
    return found
