"""Which program argument a value ends up updating.

A reduced gradient flows through elementwise work (clipping, Adam) into results that reuse a donated
argument's memory. Those results are found by walking forward; products, reductions and broadcasts
end a walk, since what lies behind them mixes several values.
"""

import re
from collections.abc import Iterator

from shardtrain.planner.hlo import Computation, Instruction, Module

_PRODUCTS = ("dot", "convolution", "custom-call", "reduce", "reduce-window", "broadcast", "compare")
_MIXERS = ("sort", "gather", "scatter", "all-reduce", "reduce-scatter", "all-to-all", "conditional")
_ENDS = frozenset(_PRODUCTS + _MIXERS)
_ALIAS = re.compile(r"\{(\d*)\}:\s*\((\d+)")
_MAX_STEPS = 400  # of one walk
_MAX_STATES = 4  # a parameter, Adam's two moments, an average

Place = tuple[str, str, int | None]  # computation, instruction, element of its tuple (None: all)


def _aliases(module: Module) -> dict[int, int]:
    """Result number -> number of the argument whose memory it reuses."""
    text = module.header.partition("input_output_alias={ ")[2].partition(" }")[0]
    return {int(out or 0): int(number) for out, number in _ALIAS.findall(text)}


class Destinations:
    """Walks values forward to the arguments they update, in one module."""

    def __init__(self, module: Module):
        self.module = module
        self._aliases = _aliases(module)
        self._loops = {
            node.callees["body"][0]: (computation, node)
            for computation in module.computations.values()
            for node in computation.instructions
            if node.opcode == "while"
        }
        self._fusions = {
            node.callees["calls"][0]: (computation, node)
            for computation in module.computations.values()
            for node in computation.instructions
            if node.opcode in ("fusion", "async-start") and "calls" in node.callees
        }

    def of(self, computation: Computation, node: Instruction, element: int | None = None) -> str:
        """Path of the argument it updates (a parameter before its optimizer state), or ""."""
        if not self._aliases:
            return ""
        entry = self.module.computations[self.module.entry]
        reached = {
            self._aliases[out]
            for out in self._results(computation, node, element)
            if out in self._aliases
        }
        names = [entry.parameters[number].operation_name for number in sorted(reached)]
        parameters = [name for name in names if "params" in name]
        if len(parameters) == 1:
            return parameters[0]
        # Where no name tells, a parameter comes before the state its optimizer keeps of it.
        return names[0] if not parameters and 0 < len(names) <= _MAX_STATES else ""

    def _results(
        self, computation: Computation, node: Instruction, element: int | None
    ) -> set[int]:
        """Numbers of the program's results that a value flows into."""
        found: set[int] = set()
        start: Place = (computation.name, node.name, element)
        waiting, seen = [start], {start}
        while waiting and len(seen) < _MAX_STEPS:
            here, name, element = waiting.pop()
            at = self.module.computations[here]
            value = at.by_name[name]
            if value.is_root and here == self.module.entry:
                found.add(element or 0)
            for place in self._next(at, value, element):
                if place not in seen:
                    seen.add(place)
                    waiting.append(place)
        return found

    def _next(self, at: Computation, value: Instruction, element: int | None) -> Iterator[Place]:
        """Where a value is found one step later."""
        if value.is_root:
            yield from self._out_of(at, element)
        for user in at.users.get(value.name, ()):
            if user.opcode == "get-tuple-element":
                if element is None or user.attribute("index") == str(element):
                    yield at.name, user.name, None
            elif user.opcode == "while" and "scatter" in user.operation_name:
                continue  # CPU programs write a scatter as a loop
            elif user.opcode in ("tuple", "while"):
                for number, operand in enumerate(user.operands):
                    if operand == value.name:
                        yield at.name, user.name, number if user.opcode == "tuple" else element
            elif user.opcode in ("fusion", "async-start") and "calls" in user.callees:
                inner = self.module.computations[user.callees["calls"][0]]
                for number, operand in enumerate(user.operands):
                    if operand == value.name:
                        yield inner.name, inner.parameters[number].name, element
            elif user.opcode not in _ENDS:
                yield at.name, user.name, element

    def _out_of(self, at: Computation, element: int | None) -> Iterator[Place]:
        """From the result of a fusion or a loop's body to the instruction that ran it."""
        caller = self._fusions.get(at.name) or self._loops.get(at.name)
        if caller is not None:
            yield caller[0].name, caller[1].name, element
