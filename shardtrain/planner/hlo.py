"""Optimised HLO text as plain Python data.

`parse_hlo` turns what `jax.stages.Compiled.as_text()` prints into computations of instructions.
Only what the readers of this package need is interpreted (names, types, operands, called
computations, where in the source it came from); everything else stays in `Instruction.attributes`.
It reads text and not the protocol buffer because the text is the only form that every backend gives
publicly.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

from shardtrain.planner.hlo_source import SourceTable, parse_source_table

_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)?\{$")
_PERCENT_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\]")
_CALLEE = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")

# Bits of one element where the name does not say it. Sub-byte numbers count as packed.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}


def _element_bits(dtype: str) -> int:
    """Bits of one element of an HLO element type such as `f32`, `bf16`, `f8e4m3fn`, `s4`."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits.group(1)) if digits else 0


@dataclass(frozen=True)
class Array:
    """One array type: `Array("f32", (8, 8))`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for length in self.shape:
            total *= length
        return total

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without the padding of a tiled layout."""
        return -(-self.size * _element_bits(self.dtype) // 8)


def arrays_of(type_text: str) -> tuple[Array, ...]:
    """The arrays of an HLO type, tuples flattened.

    Args:
        type_text: as printed, e.g. `(f32[8,8]{1,0}, s32[])`; a bounded dynamic length `<=8` is 8.

    Example:
        >>> arrays_of("(f32[8,2]{1,0:T(8,128)}, s32[])")
        (Array(dtype='f32', shape=(8, 2)), Array(dtype='s32', shape=()))
    """
    without_layouts = re.sub(r"\{[^}]*\}", "", type_text)
    return tuple(
        Array(dtype, tuple(int(n.strip().lstrip("<=")) for n in dims.split(",") if n.strip()))
        for dtype, dims in _ARRAY.findall(without_layouts)
    )


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    `operands` are names within the same computation; `arguments` is the raw text between the
    parentheses (a parameter's number, a constant's value); `attributes` is the rest of the line.
    """

    name: str
    type_text: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        if self.opcode in ("parameter", "constant"):
            return ()
        if "%" in self.arguments:
            return tuple(_PERCENT_NAME.findall(self.arguments))
        return tuple(part.split()[-1] for part in self.arguments.split(",") if part.strip())

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The result's arrays, tuples flattened."""
        return arrays_of(self.type_text)

    @cached_property
    def callees(self) -> dict[str, tuple[str, ...]]:
        """Called computations by role: `calls`, `to_apply`, `body`, `condition`, `branches`."""
        found: dict[str, tuple[str, ...]] = {}
        for role, name in _CALLEE.findall(self.attributes):
            role = "branches" if role.endswith("_computation") else role
            found[role] = (*found.get(role, ()), name)
        for names in _BRANCHES.findall(self.attributes):
            split = tuple(n.strip().lstrip("%") for n in names.split(",") if n.strip())
            found["branches"] = (*found.get("branches", ()), *split)
        return found

    @cached_property
    def operation_name(self) -> str:
        """`op_name` of the metadata: the scopes the operation was traced under."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1).replace("\\'", "'") if match else ""

    def attribute(self, name: str) -> str | None:
        """The text of an attribute whose value has no top-level comma, or None."""
        match = re.search(rf"\b{name}=((?:\{{[^}}]*\}}|[^,\s])+)", self.attributes)
        return match.group(1) if match else None

    def dims(self, name: str) -> tuple[int, ...]:
        """The integers of a brace list such as `dimensions={0,1}`; empty when absent."""
        match = re.search(rf"\b{name}=\{{([\d,\s]*)\}}", self.attributes)
        return tuple(int(n) for n in match.group(1).split(",") if n.strip()) if match else ()


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, the last or the marked one being its result."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {i.name: i for i in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter instructions by number."""
        return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, tuple[Instruction, ...]]:
        """Instructions that read a value, by the value's name."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}


@dataclass(frozen=True)
class Module:
    """A whole program: computations (callees before callers, as printed) and the source table."""

    header: str
    computations: dict[str, Computation]
    entry: str
    sources: SourceTable = field(default_factory=SourceTable)

    @property
    def num_devices(self) -> int:
        """Devices the program runs on: replicas x partitions."""
        replicas = re.search(r"replica_count=(\d+)", self.header)
        partitions = re.search(r"num_partitions=(\d+)", self.header)
        return int(replicas[1] if replicas else 1) * int(partitions[1] if partitions else 1)


def _closing_parenthesis(text: str) -> int:
    """Index of the `)` that closes a `(` opened just before `text`; its length when none does."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _parse_instruction(line: str) -> Instruction | None:
    """One instruction, or None for a line that is not one."""
    match = _INSTRUCTION.match(_COMMENT.sub("", line) if "/*" in line else line)
    if match is None:
        return None
    root, name, type_text, opcode, rest = match.groups()
    end = _closing_parenthesis(rest)
    return Instruction(name, type_text, opcode, rest[:end], rest[end + 1 :], root is not None)


def parse_hlo(text: str) -> Module:
    """Parse optimised HLO text.

    Args:
        text: what `Compiled.as_text()` returned.

    Raises:
        ValueError: there is no entry computation (the text is StableHLO, or something else).

    Example:
        >>> module = parse_hlo('''HloModule m, num_partitions=2
        ... ENTRY %main (x: f32[4]) -> f32[4] {
        ...   ROOT %x = f32[4]{0} parameter(0)
        ... }''')
        >>> module.entry, module.num_devices
        ('main', 2)
    """
    lines = text.splitlines()
    computations: dict[str, Computation] = {}
    entry, current, body = "", "", []
    for line in lines:
        if current and line.startswith("}"):
            computations[current] = Computation(current, tuple(body))
            current, body = "", []
        elif current:
            instruction = _parse_instruction(line)
            if instruction is not None:
                body.append(instruction)
        elif line.endswith("{"):
            match = _COMPUTATION.match(_COMMENT.sub("", line))
            if match is not None:
                current = match.group(2)
                entry = current if match.group(1) else entry
    if not entry:
        raise ValueError(
            "no ENTRY computation: this is not optimised HLO text (Compiled.as_text())"
        )
    header = next((line for line in lines if line.startswith("HloModule")), "")
    return Module(header, computations, entry, parse_source_table(lines))
