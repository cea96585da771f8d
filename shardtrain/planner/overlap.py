"""How much computing is scheduled between the start and the end of an asynchronous collective."""

from shardtrain.planner.flops import instruction_flops
from shardtrain.planner.hlo import Computation, Instruction, Module
from shardtrain.planner.trip_counts import TripCounts

_CALLED = ("calls", "to_apply", "body", "condition", "branches")
_MAX_STEPS = 200  # from a start to its end


class Overlaps:
    """Operations between two instructions of one module's schedule."""

    def __init__(self, module: Module):
        self.module = module
        self._trips = TripCounts(module)
        self._totals: dict[str, int] = {}

    def of(self, computation: Computation, start: Instruction) -> int:
        """Operations scheduled after a start and before its end, in one execution.

        Args:
            computation: where the start is.
            start: a `-start`, or the fusion that starts a TPU chain.
        """
        end = self._end(computation, start)
        if end is None:
            return 0
        order = [node.name for node in computation.instructions]
        first, last = order.index(start.name), order.index(end.name)
        between = computation.instructions[first + 1 : last + 1]
        return sum(self._flops(computation, node) for node in between)

    def _end(self, computation: Computation, start: Instruction) -> Instruction | None:
        """The matching `-done`, or the fusion that holds a chain's `AsyncCollectiveDone`."""
        waiting, seen = [start], {start.name}
        for _ in range(_MAX_STEPS):
            if not waiting:
                return None
            for user in computation.users.get(waiting.pop(0).name, ()):
                if user.opcode.endswith("-done") or self._ends_chain(user):
                    return user
                is_link = user.opcode in ("get-tuple-element", "fusion") or "-update" in user.opcode
                if is_link and user.name not in seen:
                    seen.add(user.name)
                    waiting.append(user)
        return None

    def _ends_chain(self, node: Instruction) -> bool:
        if node.opcode != "fusion":
            return False
        inner = self.module.computations[node.callees["calls"][0]]
        return any("AsyncCollectiveDone" in i.attributes for i in inner.instructions)

    def _flops(self, computation: Computation, node: Instruction) -> int:
        """Operations of an instruction and of all it runs."""
        total = instruction_flops(computation, node) or 0
        times = (self._trips.of(computation, node) or 1) if node.opcode == "while" else 1
        if node.opcode in ("fusion", "call", "while", "conditional"):
            called = [self._total(n) for role in _CALLED for n in node.callees.get(role, ())]
            total += times * (max(called) if node.opcode == "conditional" else sum(called))
        return total

    def _total(self, name: str) -> int:
        if name not in self._totals:
            computation = self.module.computations[name]
            self._totals[name] = sum(self._flops(computation, n) for n in computation.instructions)
        return self._totals[name]
