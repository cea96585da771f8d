"""How often the body of an HLO `while` runs.

XLA writes `known_trip_count` on most CPU and GPU loops. TPU programs carry none, so the loop is
read instead: the condition compares a counter with a limit, the body adds a constant to it.
The limit and the start may come through tuples, fusions, copies and enclosing loops.
"""

import re
from dataclasses import dataclass

from shardtrain.planner.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_SAME_VALUE = (
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "optimization-barrier",
    "copy-start",
    "copy-done",
)
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
_DEPTH = 64  # of chains followed; real ones have a few steps


@dataclass(frozen=True)
class Linear:
    """`slot + offset`; `slot` is an element of the loop's carried tuple (None: a constant)."""

    slot: int | None
    offset: int


Arguments = dict[int, "Linear | None"]


class TripCounts:
    """Trip counts of all loops of one module, each resolved once."""

    def __init__(self, module: Module):
        self.module = module
        self._known: dict[tuple[str, str], int | None] = {}
        self._callers: dict[str, tuple[Computation, Instruction]] = {}
        for computation in module.computations.values():
            for instruction in computation.instructions:
                for names in instruction.callees.values():
                    for name in names:
                        self._callers.setdefault(name, (computation, instruction))

    def of(self, computation: Computation, loop: Instruction) -> int | None:
        """Iterations of a `while`, or None when they depend on data."""
        key = (computation.name, loop.name)
        if key not in self._known:
            known = _KNOWN.search(loop.attributes)
            self._known[key] = int(known[1]) if known else self._analyse(computation, loop)
        return self._known[key]

    def _analyse(self, computation: Computation, loop: Instruction) -> int | None:
        body = self.module.computations[loop.callees["body"][0]]
        compare = self._comparison(self.module.computations[loop.callees["condition"][0]], None)
        if compare is None:
            return None
        counter, limit, direction = compare
        if not self._step(body, counter.slot):  # limit on the left: `n > i` is `i < n`
            counter, limit, direction = limit, counter, _MIRRORED.get(direction, direction)
        step = self._step(body, counter.slot)
        start = self._initial(computation, loop, counter.slot, 0)
        stop = self._stop(computation, loop, body, limit)
        if not step or start is None or stop is None:
            return None
        return _iterations(start + counter.offset, stop, step, direction)

    def _stop(
        self, computation: Computation, loop: Instruction, body: Computation, limit: Linear
    ) -> int | None:
        """The limit as a number: a constant, or a carried element that never changes."""
        if limit.slot is None:
            return limit.offset
        start = self._initial(computation, loop, limit.slot, 0)
        is_constant = start is not None and self._step(body, limit.slot) == 0
        return start + limit.offset if start is not None and is_constant else None

    def _comparison(
        self, condition: Computation, arguments: Arguments | None
    ) -> tuple[Linear, Linear, str] | None:
        root = condition.root
        if root.opcode in ("fusion", "call"):
            inner = self.module.computations[
                (root.callees.get("calls") or root.callees["to_apply"])[0]
            ]
            return self._comparison(inner, self._bind(condition, root, arguments))
        if root.opcode != "compare" or len(root.operands) != 2:
            return None
        left, right = (self._value(condition, name, arguments, 0) for name in root.operands)
        direction = root.attribute("direction")
        return (left, right, direction) if left and right and direction else None

    def _step(self, body: Computation, slot: int | None) -> int | None:
        """What one iteration adds to a carried element; 0 when it is passed through."""
        if slot is None or body.root.opcode != "tuple" or slot >= len(body.root.operands):
            return None
        value = self._value(body, body.root.operands[slot], None, 0)
        return value.offset if value is not None and value.slot == slot else None

    def _initial(
        self, computation: Computation, loop: Instruction, slot: int | None, depth: int
    ) -> int | None:
        """The constant a carried element starts from, looked for in the enclosing loops too."""
        if slot is None or depth > _DEPTH:
            return None
        start = computation.by_name.get(loop.operands[0])
        while start is not None and start.opcode in _SAME_VALUE:
            start = computation.by_name.get(start.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        value = self._value(computation, start.operands[slot], None, 0)
        if value is None or value.slot is None:
            return value.offset if value is not None else None
        outer = self._callers.get(computation.name)
        if outer is None or outer[1].opcode != "while" or self._step(computation, value.slot) != 0:
            return None
        outer_start = self._initial(*outer, value.slot, depth + 1)
        return None if outer_start is None else outer_start + value.offset

    def _bind(
        self, computation: Computation, call: Instruction, arguments: Arguments | None
    ) -> Arguments:
        return {
            number: self._value(computation, name, arguments, 0)
            for number, name in enumerate(call.operands)
        }

    def _value(
        self, computation: Computation, name: str, arguments: Arguments | None, depth: int
    ) -> Linear | None:
        """A scalar as `carried element + constant`; `arguments` are given inside a fusion."""
        node = computation.by_name.get(name)
        if node is None or depth > _DEPTH:
            return None
        if node.opcode == "constant":
            return (
                Linear(None, int(node.arguments))
                if re.fullmatch(r"-?\d+", node.arguments)
                else None
            )
        if node.opcode == "parameter":
            return None if arguments is None else arguments.get(int(node.arguments))
        if node.opcode in _SAME_VALUE:
            return self._value(computation, node.operands[0], arguments, depth + 1)
        if node.opcode == "get-tuple-element":
            source = computation.by_name.get(node.operands[0])
            index = node.attribute("index")
            is_carried = source is not None and source.opcode == "parameter" and arguments is None
            return Linear(int(index), 0) if is_carried and index is not None else None
        if node.opcode in ("add", "subtract"):
            return self._sum(computation, node, arguments, depth)
        if node.opcode in ("fusion", "call"):
            callee = self.module.computations[
                (node.callees.get("calls") or node.callees["to_apply"])[0]
            ]
            inner = self._bind(computation, node, arguments)
            return self._value(callee, callee.root.name, inner, depth + 1)
        return None

    def _sum(
        self, computation: Computation, node: Instruction, arguments: Arguments | None, depth: int
    ) -> Linear | None:
        left, right = (self._value(computation, n, arguments, depth + 1) for n in node.operands)
        if left is None or right is None:
            return None
        if node.opcode == "subtract":
            return Linear(left.slot, left.offset - right.offset) if right.slot is None else None
        if left.slot is not None and right.slot is not None:
            return None
        return Linear(left.slot if right.slot is None else right.slot, left.offset + right.offset)


def _iterations(start: int, limit: int, step: int, direction: str) -> int | None:
    """Iterations of `for (i = start; i <direction> limit; i += step)`."""
    if direction == "LE":
        limit, direction = limit + 1, "LT"
    if direction == "GE":
        limit, direction = limit - 1, "GT"
    if direction == "LT" and step > 0:
        return max(0, -(-(limit - start) // step))
    if direction == "GT" and step < 0:
        return max(0, -(-(start - limit) // -step))
    if direction == "NE" and step and (limit - start) % step == 0 and (limit - start) // step >= 0:
        return (limit - start) // step
    return None
