"""Which program argument a value is a copy of.

A gather of parameters reads an argument through layout changes, casts, slices and loop tuples.
Those are walked back; at the first real computation the walk ends, and the value has no owner.
"""

import dataclasses
from dataclasses import dataclass

from shardtrain.planner.hlo import Computation, Instruction, Module

_COPIES = ("bitcast", "bitcast-convert", "copy", "convert", "reshape", "transpose", "slice")
_ASYNC_COPIES = ("copy-start", "copy-done", "slice-start", "slice-done", "optimization-barrier")
_GATHERS = ("all-gather", "all-gather-start", "all-gather-done")
_PASS_THROUGH = frozenset((*_COPIES, *_ASYNC_COPIES, *_GATHERS, "dynamic-slice"))
_MAX_STEPS = 500  # of one walk; deep programs have tens


@dataclass(frozen=True)
class Origin:
    """An argument of the entry computation; `is_sliced`: a slice chosen at run time is read."""

    argument: str
    number: int
    is_sliced: bool = False


@dataclass(frozen=True)
class Value:
    """A value in a computation; `path` picks an element of it when it is a tuple."""

    computation: Computation
    node: Instruction
    path: tuple[int, ...] = ()


class Origins:
    """Walks values back to entry arguments in one module."""

    def __init__(self, module: Module):
        self.module = module
        self._callers: dict[str, tuple[Computation, Instruction]] = {}
        for computation in module.computations.values():
            for node in computation.instructions:
                for names in node.callees.values():
                    for name in names:
                        self._callers.setdefault(name, (computation, node))

    def of(self, computation: Computation, name: str) -> Origin | None:
        """The entry argument behind a value, or None when the value was computed."""
        node = computation.by_name.get(name)
        value = None if node is None else Value(computation, node)
        is_sliced = False
        for _ in range(_MAX_STEPS):
            if value is None:
                return None
            if value.node.opcode == "parameter" and value.computation.name == self.module.entry:
                number = int(value.node.arguments)
                return Origin(value.node.operation_name or f"argument {number}", number, is_sliced)
            is_sliced |= value.node.opcode == "dynamic-slice"
            value = self._back(value)
        return None

    def caller(self, name: str) -> tuple[Computation, Instruction] | None:
        """The instruction that runs a computation, and where it is; None for the entry."""
        return self._callers.get(name)

    def made_by(self, computation: Computation, name: str, opcode: str) -> Value | None:
        """The instruction of that opcode which made a value, looking through copies and calls."""
        node = computation.by_name.get(name)
        value = None if node is None else Value(computation, node)
        for _ in range(_MAX_STEPS):
            if value is None or value.node.opcode == opcode:
                return value
            value = self._back(value)
        return None

    def _operand(self, value: Value, number: int, path: tuple[int, ...]) -> Value | None:
        names = value.node.operands
        node = value.computation.by_name.get(names[number]) if number < len(names) else None
        return None if node is None else Value(value.computation, node, path)

    def _back(self, value: Value) -> Value | None:
        """The value one step earlier that holds the same data."""
        node, path = value.node, value.path
        # TPU programs prefetch an argument in slices and put them together with this call.
        is_joined = node.opcode == "custom-call" and "ConcatBitcast" in node.attributes
        if node.opcode in _PASS_THROUGH or is_joined:
            return self._operand(value, 0, path)
        if node.opcode == "get-tuple-element":
            return self._operand(value, 0, (int(node.attribute("index") or 0), *path))
        if node.opcode == "tuple" and path:
            return self._operand(value, path[0], path[1:])
        if node.opcode == "parameter":
            return self._out_of_call(value)
        if node.opcode == "while" and self._is_invariant(node, path):
            return self._operand(value, 0, path)
        if node.opcode in ("fusion", "call"):
            callee = (node.callees.get("calls") or node.callees.get("to_apply") or ("",))[0]
            inner = self.module.computations.get(callee)
            return None if inner is None else Value(inner, inner.root, path)
        return None

    def _out_of_call(self, value: Value) -> Value | None:
        """From a parameter of a called computation to the caller's operand."""
        if value.computation.name not in self._callers:
            return None
        computation, call = self._callers[value.computation.name]
        at_call = dataclasses.replace(value, computation=computation, node=call)
        if call.opcode == "while":
            return (
                self._operand(at_call, 0, value.path)
                if self._is_invariant(call, value.path)
                else None
            )
        number = int(value.node.arguments)
        if call.opcode == "conditional":
            number = 1 + call.callees["branches"].index(value.computation.name)
        return self._operand(at_call, number, value.path)

    def _is_invariant(self, loop: Instruction, path: tuple[int, ...]) -> bool:
        """Whether every iteration hands a carried element on unchanged."""
        body = self.module.computations[loop.callees["body"][0]]
        if not path or body.root.opcode != "tuple" or path[0] >= len(body.root.operands):
            return False
        node = body.by_name.get(body.root.operands[path[0]])
        while node is not None and node.opcode in ("copy", "bitcast", "optimization-barrier"):
            node = body.by_name.get(node.operands[0])
        if node is None or node.opcode != "get-tuple-element":
            return False
        source = body.by_name.get(node.operands[0])
        is_carried = source is not None and source.opcode == "parameter"
        return is_carried and node.attribute("index") == str(path[0])
