"""How a collective's result is used, and whether its input changes between iterations."""

from shardtrain.planner.hlo import Computation, Instruction, Module
from shardtrain.planner.owners import Origins, Value

_LAYOUT = frozenset(
    ("bitcast", "reshape", "copy", "transpose", "convert", "all-reduce-done", "pad")
)


def slices_of(
    module: Module, computation: Computation, node: Instruction
) -> list[Instruction] | None:
    """The dynamic slices that are all that is read of a value; None when more of it is read.

    Layout changes, casts and fusions are looked through; a tuple element or a computation's result
    counts as read.
    """
    found: list[Instruction] = []
    for user in computation.users.get(node.name, ()):
        if user.opcode == "dynamic-slice" and user.operands[0] == node.name:
            found.append(user)
            continue
        inner: list[Instruction] | None = None
        if user.opcode in _LAYOUT and not user.is_root:
            inner = slices_of(module, computation, user)
        elif user.opcode == "fusion":
            inner = _slices_in_fusion(module, user, node.name)
        if inner is None:
            return None
        found += inner
    return found or None


def _slices_in_fusion(module: Module, fusion: Instruction, name: str) -> list[Instruction] | None:
    callee = module.computations[fusion.callees["calls"][0]]
    found: list[Instruction] = []
    for number, operand in enumerate(fusion.operands):
        if operand == name:
            inner = slices_of(module, callee, callee.parameters[number])
            if inner is None:
                return None
            found += inner
    return found


def is_only_sliced(
    module: Module, computation: Computation, node: Instruction, group_size: int
) -> bool:
    """Whether each device keeps only one of `group_size` equal parts of a collective's result."""
    values = (node,)
    if node.type_text.startswith("("):  # combined: one result per operand
        values = computation.users.get(node.name, ())
        if any(v.opcode != "get-tuple-element" for v in values):
            return False
    for value in values:
        slices = slices_of(module, computation, value)
        part = value.arrays[0].size // group_size
        if slices is None or any(s.arrays[0].size != part for s in slices):
            return False
    return group_size > 1 and bool(values)


def summed_pieces(
    origins: Origins, computation: Computation, node: Instruction, group_size: int
) -> list[Value] | None:
    """The pieces of an all-reduce that only puts them together; None when it does more.

    Each device writes its piece, one of `group_size`, into zeros, and the sum is the whole: a
    gather that sends twice as much. TPU compilers write some all-gathers so.
    """
    pieces = []
    for name in node.operands:
        update = origins.made_by(computation, name, "dynamic-update-slice")
        if update is None:
            return None
        base, piece = update.node.operands[:2]
        whole = sum(array.size for array in update.node.arrays)
        made = update.computation.by_name[piece]
        part = sum(array.size for array in made.arrays)
        zeros = origins.made_by(update.computation, base, "broadcast")
        if zeros is None or group_size < 2 or part * group_size != whole:
            return None
        pieces.append(Value(update.computation, made))
    return pieces or None


def is_loop_invariant(origins: Origins, computation: Computation, node: Instruction) -> bool:
    """Whether every operand is a whole program argument, the same in each iteration of a loop."""
    found = [origins.of(computation, name) for name in node.operands]
    return bool(found) and all(o is not None and not o.is_sliced for o in found)
