"""What a compiled program communicates: kind, bytes, mesh axes, executions, source.

The optimised HLO is the one place where all communication of a step is written down, whoever asked
for it (the user, a sharding constraint, XLA's partitioner).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from shardtrain.planner.destinations import Destinations
from shardtrain.planner.executions import Execution, count_executions
from shardtrain.planner.hlo import Computation, Instruction, Module, parse_hlo
from shardtrain.planner.owners import Origins
from shardtrain.planner.replica_groups import (
    groups_are_whole,
    parse_pairs,
    parse_replica_groups,
    varying_axes,
)
from shardtrain.planner.usage import is_loop_invariant, is_only_sliced

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
UNKNOWN_AXES = ("?",)
_CHAIN = "frontend_attributes={chain_id="


@dataclass(frozen=True)
class Collective:
    """One communication of a compiled step, as one device sees it.

    Attributes:
        kind: HLO name: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`,
            `collective-permute`, `ragged-all-to-all`, `collective-broadcast`.
        bytes: payload of one execution on one device: all-reduce, the array reduced; all-gather,
            the gathered *result*; reduce-scatter, the unscattered *input*; all-to-all, the array
            exchanged; permute and broadcast, the array sent; ragged-all-to-all, the input buffer
            (what is really sent depends on data). Combined collectives: the sum. What the wires
            carry: `wire_bytes`.
        axes: names of the mesh axes it runs over, in mesh order; `("?",)` when its groups are not
            all devices along some axes (see `within`).
        count: executions per step, loop trip counts multiplied out.
        is_async: the program starts it and waits for it in two instructions.
        source: `file:line` of the line of code it came from, or "".
        parameter: the program argument it moves or, for a reduction, updates (a path such as
            `params['w']`; several joined with ` + `); "" when there is none or it is not clear.
            Of a combined reduction, those that are clear.
        operation_name: scopes it was traced under, from JAX; of the first of merged rows.
        group_size: devices that take part in one group.
        num_operands: arrays combined into it.
        is_exact: False when `count` assumes one pass of a data-dependent loop, or that the branch
            of a conditional is taken.
        in_loop: it runs in the body of a loop.
        is_loop_invariant: in a loop, an all-gather of the same program argument in each iteration.
        is_only_sliced: an all-reduce of whose result each device reads only its own part.
        within: the mesh axes along which its groups vary; differs from `axes` only where that is
            `("?",)`.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    count: int = 1
    is_async: bool = False
    source: str = ""
    parameter: str = ""
    operation_name: str = ""
    group_size: int = 0
    num_operands: int = 1
    is_exact: bool = True
    in_loop: bool = False
    is_loop_invariant: bool = False
    is_only_sliced: bool = False
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layout:
    """Mesh axis names and sizes, and where in the mesh each logical device position is."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    place: tuple[int, ...]  # logical position -> flat index into the mesh

    def axes(self, groups: Sequence[Sequence[int]], *, whole: bool) -> tuple[tuple[str, ...], ...]:
        """`(axes, within)` of groups; `whole` groups must be all devices along their axes."""
        if any(not 0 <= p < len(self.place) for group in groups for p in group):
            return UNKNOWN_AXES, ()
        placed = [[self.place[p] for p in group] for group in groups]
        dims = varying_axes(placed, self.shape) or ()
        within = tuple(self.names[d] for d in dims)
        if whole and not groups_are_whole(placed, self.shape):
            return UNKNOWN_AXES, within
        return within, within


def _layout(
    names: Sequence[str], device_ids: np.ndarray, assignment: Sequence[int] | None
) -> _Layout:
    ids = np.asarray(device_ids)
    if ids.ndim != len(names):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for a mesh of shape {ids.shape}")
    flat = [int(i) for i in ids.ravel()]
    order = flat if assignment is None else [int(i) for i in assignment]
    if sorted(order) != sorted(flat):
        raise ValueError(
            f"the program runs on devices {sorted(order)}, the mesh has {sorted(flat)}: "
            "pass the mesh it was compiled for"
        )
    index = {device: i for i, device in enumerate(flat)}
    return _Layout(tuple(names), tuple(ids.shape), tuple(index[i] for i in order))


def _payload(
    computation: Computation, node: Instruction, kind: str, group_size: int
) -> tuple[int, int]:
    """Bytes of one execution on one device, and the number of operands.

    Taken from the operands, which are the same for the plain, the `-start` and the fused form
    (their results are not).
    """
    operands = [computation.by_name[name] for name in node.operands if name in computation.by_name]
    if kind == "ragged-all-to-all":
        operands = operands[:1]  # the others: output buffer, offsets and sizes
    if kind == "collective-permute" and (sizes := _slice_sizes(node)):
        # In-place form: operands are buffers, of which slices are sent.
        width = operands[0].arrays[0].bytes // max(operands[0].arrays[0].size, 1)
        return sum(math.prod(s) for s in sizes) * width, len(sizes)
    total = sum(array.bytes for operand in operands for array in operand.arrays)
    return total * (group_size if kind == "all-gather" else 1), len(operands)


def _is_async(node: Instruction, at: Execution) -> bool:
    """Whether work can overlap. GPU programs start all, and mark those waited for at once."""
    starts = at.is_async or node.opcode.endswith("-start") or _CHAIN in node.attributes
    return starts and '"is_sync":true' not in node.attributes


def _slice_sizes(node: Instruction) -> list[tuple[int, ...]]:
    text = node.attributes.partition("slice_sizes={{")[2].partition("}}")[0]
    return [tuple(int(n) for n in part.split(",")) for part in text.split("},{")] if text else []


def _is_scattered(computation: Computation, node: Instruction) -> bool:
    """Whether a fused all-reduce is only sliced: how TPU programs spell reduce-scatter."""
    users = computation.users.get(node.name, ())
    while users and all(u.opcode in ("bitcast", "reshape", "copy", "pad") for u in users):
        users = tuple(w for u in users for w in computation.users.get(u.name, ()))
    return bool(users) and all(u.opcode == "dynamic-slice" for u in users)


def _starts_chain(computation: Computation, node: Instruction) -> bool:
    """Whether a collective is the first of a TPU chain: the one that starts the transfer."""
    return any("AsyncCollectiveStart" in u.attributes for u in computation.users.get(node.name, ()))


def _kind(computation: Computation, node: Instruction, at: Execution) -> str | None:
    """The collective an instruction is, or None.

    Not counted again: `-done` halves, and the later links of a TPU chain (`chain_id`), in which
    each fusion that a transfer overlaps with repeats the collective.
    """
    name = node.opcode.removesuffix("-start")
    if name not in KINDS:
        return None
    if _CHAIN in node.attributes and not _starts_chain(computation, node):
        return None
    if name == "all-reduce" and at.fused_by is not None and _is_scattered(computation, node):
        return "reduce-scatter"
    return name


def _parameter(flow: "_Flow", computation: Computation, node: Instruction) -> str:
    """The arguments that the operands come from, or that a reduction updates; "" if not known."""
    found = [flow.origins.of(computation, name) for name in node.operands]
    names = [origin.argument if origin else "" for origin in found]
    if "" in names and node.opcode.startswith(("all-reduce", "reduce-scatter")):
        each = range(len(names)) if len(names) > 1 else (None,)
        found_ahead = [flow.destinations.of(computation, node, element) for element in each]
        names = [name for name in found_ahead if name] or [""]
    return "" if "" in names else " + ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class _Flow:
    """Where values of one module come from and go to."""

    module: Module
    origins: Origins
    destinations: Destinations


def _read(
    flow: _Flow, computation: Computation, node: Instruction, at: Execution, layout: _Layout
) -> Collective | None:
    """One collective, or None when it communicates nothing (groups of one device)."""
    module, kind = flow.module, _kind(computation, node, at)
    if kind is None:
        return None
    pairs = parse_pairs(node.attributes)
    if pairs is not None:
        groups = [list(pair) for pair in pairs if pair[0] != pair[1]]
        group_size = 2 if groups else 1
    else:
        groups = parse_replica_groups(node.attributes, module.num_devices) or []
        group_size = max((len(group) for group in groups), default=0)
    if group_size == 1:
        return None
    axes, within = layout.axes(groups, whole=pairs is None) if groups else (UNKNOWN_AXES, ())
    size, num_operands = _payload(computation, node, kind, group_size)
    fused = at.fused_by
    source = module.sources.locate(node.attributes)
    return Collective(
        kind=kind,
        bytes=size,
        axes=axes,
        count=at.count,
        is_async=_is_async(node, at),
        source=source or (module.sources.locate(fused.attributes) if fused else ""),
        parameter=_parameter(flow, computation, node),
        operation_name=node.operation_name or (fused.operation_name if fused else ""),
        group_size=group_size,
        num_operands=num_operands,
        is_exact=at.is_exact,
        in_loop=at.in_loop,
        is_loop_invariant=kind == "all-gather"
        and at.in_loop
        and is_loop_invariant(flow.origins, computation, node),
        is_only_sliced=kind == "all-reduce"
        and is_only_sliced(module, computation, node, group_size),
        within=within,
    )


def merge_collectives(collectives: Sequence[Collective]) -> list[Collective]:
    """One row for collectives that differ only in `count` and `operation_name`, counts added."""
    rows: dict[Collective, Collective] = {}
    for item in collectives:
        key = dataclasses.replace(item, count=0, operation_name="")
        if key in rows:
            rows[key] = dataclasses.replace(rows[key], count=rows[key].count + item.count)
        else:
            rows[key] = item
    return list(rows.values())


def collectives_in(
    module: Module,
    axis_names: Sequence[str],
    device_ids: np.ndarray,
    assignment: Sequence[int] | None = None,
) -> list[Collective]:
    """All collectives of a parsed module, merged. Arguments as `parse_collectives`."""
    layout = _layout(axis_names, device_ids, assignment)
    executions = count_executions(module)
    flow = _Flow(module, Origins(module), Destinations(module))
    found = []
    for name, computation in module.computations.items():
        at = executions.get(name)
        if at is None or at.count == 0:
            continue
        for node in computation.instructions:
            item = _read(flow, computation, node, at, layout)
            if item is not None:
                found.append(item)
    return merge_collectives(found)


def parse_collectives(
    hlo_text: str,
    axis_names: Sequence[str],
    device_ids: np.ndarray,
    assignment: Sequence[int] | None = None,
) -> list[Collective]:
    """Collectives of an optimised HLO text, on one device.

    Args:
        hlo_text: `Compiled.as_text()`.
        axis_names: mesh axis names, one per dim of `device_ids`.
        device_ids: `Device.id` of each device of the mesh, in the mesh's shape.
        assignment: `Device.id` by logical position in the executable; None: the mesh's row-major
            order, which is what JAX compiles for. HLO numbers devices by position, never by id.

    Returns:
        One row per distinct collective. Groups of a single device are left out.

    Raises:
        ValueError: the text is not optimised HLO, or mesh, names and assignment disagree.

    Example:
        >>> hlo = '''HloModule m, num_partitions=4
        ... ENTRY %e (x: f32[8]) -> f32[8] {
        ...   %x = f32[8]{0} parameter(0)
        ...   ROOT %r = f32[8]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add
        ... }'''
        >>> (found,) = parse_collectives(hlo, ("a", "b"), np.arange(4).reshape(2, 2))
        >>> found.kind, found.bytes, found.axes
        ('all-reduce', 32, ('a',))
    """
    return collectives_in(parse_hlo(hlo_text), axis_names, device_ids, assignment)


def device_assignment(compiled: jax.stages.Compiled) -> list[int] | None:
    """`Device.id` by logical position, read from the shardings of a compiled program's arguments.

    None when no argument or result has a `NamedSharding` (then it says nothing).
    """
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return [device.id for device in sharding.mesh.devices.flat]
    return None


def collectives_of(compiled: jax.stages.Compiled, mesh: Mesh) -> list[Collective]:
    """Collectives of a compiled program.

    Args:
        compiled: `jax.jit(f).lower(...).compile()`.
        mesh: names for its devices; need not have the order the program was compiled with.

    Raises:
        ValueError: the program runs on other devices than the mesh's, or gives no text.
    """
    text = compiled.as_text()
    if not text:
        raise ValueError("the backend gives no HLO text for this program")
    ids = np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)
    return parse_collectives(text, mesh.axis_names, ids, device_assignment(compiled))
