"""Which buffers of a compiled step are alive at its fullest moment.

A compiled program is scheduled (it runs in the order printed), so the buffers alive at each
instruction can be followed: each result is alive until its last reader, elementwise work takes over
an operand it is the last to read, loops work in place on what they carry, and a computation that is
called adds its own fullest moment. Fragmentation, padding and scratch inside kernels are not seen.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardtrain.planner.hlo import Computation, Instruction, Module, arrays_of

_IN_PLACE = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier", "while", "parameter")
_ARRAY = re.compile(r"[a-z][a-z0-9]*\[[^\]]*\](?:\{[^}]*\})?")
_OTHER_MEMORY = re.compile(r"S\([1-9]\)")  # TPU on-chip memory, host memory
_ARITHMETIC = ("add", "subtract", "multiply", "divide", "negate", "maximum", "minimum", "select")
_FUNCTIONS = ("tanh", "exponential", "sqrt", "rsqrt", "log", "power", "abs", "logistic")
_ELEMENTWISE = frozenset((*_ARITHMETIC, *_FUNCTIONS, "all-reduce"))
_NO_BUFFER = ("constant", "parameter", "partition-id", "replica-id", "after-all")

Value = tuple[frozenset[str], ...]  # per element of a (flat) tuple: buffers it may live in


@dataclass(frozen=True)
class Live:
    """A buffer alive at some moment: who made it, its type as printed, its bytes."""

    computation: Computation
    node: Instruction
    type_text: str
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a computation."""

    bytes: int = 0
    alive: tuple[Live, ...] = ()


def _elements(node: Instruction) -> list[tuple[str, int]]:
    """(type, bytes in device memory) of each array of a result; other memories count nothing."""
    return [
        (text, 0 if _OTHER_MEMORY.search(text) else sum(array.bytes for array in arrays_of(text)))
        for text in _ARRAY.findall(node.type_text)
    ]


def _updated_operand(module: Module, node: Instruction) -> int | None:
    """The operand an instruction writes its result into, if it works in place."""
    if node.opcode == "dynamic-update-slice":
        return 0
    if node.opcode != "fusion":
        return None
    inner = module.computations[node.callees["calls"][0]]
    root: Instruction | None = inner.root
    while root is not None and root.opcode == "bitcast":
        root = inner.by_name.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return None
    target = inner.by_name.get(root.operands[0])
    while target is not None and target.opcode == "bitcast":
        target = inner.by_name.get(target.operands[0])
    is_argument = target is not None and target.opcode == "parameter"
    return int(target.arguments) if target is not None and is_argument else None


def _reused(
    node: Instruction,
    values: dict[str, Value],
    alive: Mapping[str, Live],
    last: Mapping[str, int],
    now: int,
    made: Iterable[Live],
) -> list[str]:
    """Operands read here for the last time whose memory the results take over."""
    if node.opcode not in _ELEMENTWISE and "kind=kLoop" not in node.attributes:
        return []
    ending = {
        buffer: alive[buffer].bytes
        for name in node.operands
        for buffer in frozenset().union(*values.get(name, ()))
        if buffer in alive and last[buffer] == now
    }
    found = []
    for new in made:
        same = next((b for b, s in ending.items() if s == new.bytes and b not in found), None)
        found += [same] if same is not None else []
    return found


class Liveness:
    """Fullest moments of all computations of one module, each found once."""

    def __init__(self, module: Module):
        self.module = module
        self._peaks: dict[str, Peak] = {}

    def peak(self, name: str) -> Peak:
        """The fullest moment of a computation, called ones included."""
        if name not in self._peaks:
            self._peaks[name] = self._find(self.module.computations[name])
        return self._peaks[name]

    def _values(self, computation: Computation) -> dict[str, Value]:
        """Buffers behind every instruction's result."""
        values: dict[str, Value] = {}
        for node in computation.instructions:
            operands = [values.get(name, (frozenset(),)) for name in node.operands]
            everything = frozenset().union(*(part for value in operands for part in value))
            updated = _updated_operand(self.module, node)
            if node.opcode == "tuple":
                values[node.name] = tuple(frozenset().union(*value) for value in operands)
            elif node.opcode == "get-tuple-element" and operands:
                index = int(node.attribute("index") or 0)
                value = operands[0]
                values[node.name] = (value[index] if index < len(value) else everything,)
            elif node.opcode in ("while", "optimization-barrier") and operands:
                values[node.name] = operands[0]
            elif node.opcode in _IN_PLACE or node.opcode.endswith("-done"):
                values[node.name] = (everything,)
            elif updated is not None and updated < len(operands):
                values[node.name] = operands[updated]
            elif node.opcode in _NO_BUFFER:
                values[node.name] = (frozenset(),)
            elif node.type_text.startswith("(") and not node.opcode.endswith("-start"):
                values[node.name] = tuple(
                    frozenset((f"{node.name}#{n}",)) for n in range(len(node.arrays))
                )
            else:
                values[node.name] = (frozenset((node.name,)),)
        return values

    def _made(self, computation: Computation, node: Instruction) -> dict[str, Live]:
        """The buffers an instruction makes."""
        elements = _elements(node)
        if node.opcode.endswith("-start") and node.type_text.startswith("("):
            # The operands are repeated in the result; only the rest is new.
            total = sum(size for _, size in elements)
            for name in node.operands:
                total -= sum(size for _, size in _elements(computation.by_name[name]))
            new = elements[len(node.operands) :] or elements
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            return {node.name: Live(computation, node, new[0][0] + more, max(total, 0))}
        if node.type_text.startswith("("):
            return {
                f"{node.name}#{n}": Live(computation, node, text, size)
                for n, (text, size) in enumerate(elements)
            }
        text, size = elements[0] if elements else ("", 0)
        return {node.name: Live(computation, node, text, size)}

    def _inner(self, node: Instruction) -> Peak:
        """The fullest moment of what an instruction calls."""
        if node.opcode not in ("while", "call", "conditional"):
            return Peak()
        names = [n for role in node.callees.values() for n in role if n in self.module.computations]
        return max((self.peak(name) for name in names), key=lambda p: p.bytes, default=Peak())

    def _find(self, computation: Computation) -> Peak:
        values = self._values(computation)
        order = {node.name: n for n, node in enumerate(computation.instructions)}
        last: dict[str, int] = {}
        for node in computation.instructions:
            for name in (node.name, *node.operands):
                for buffer in frozenset().union(*values.get(name, ())):
                    last[buffer] = order[node.name]
        # What is returned belongs to the caller: outputs, or the next iteration's carried arrays.
        returned = frozenset().union(*values[computation.root.name])
        alive: dict[str, Live] = {}
        now, best = 0, Peak()
        for n, node in enumerate(computation.instructions):
            made = frozenset().union(*values[node.name])
            new = self._made(computation, node)
            for buffer in _reused(node, values, alive, last, n, new.values()):
                now -= alive.pop(buffer).bytes
            for buffer, live in new.items():
                if buffer in made and buffer not in returned and buffer not in alive:
                    alive[buffer] = live
                    now += live.bytes
            inner = self._inner(node)
            if now + inner.bytes > best.bytes:
                best = Peak(now + inner.bytes, (*alive.values(), *inner.alive))
            for buffer in [b for b in alive if last.get(b, n) <= n]:
                now -= alive.pop(buffer).bytes
        return best
