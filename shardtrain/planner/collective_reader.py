"""One HLO instruction as a `Collective`: kind, payload, axes, where it came from."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardtrain.planner.collective import KINDS, UNKNOWN_AXES, Collective
from shardtrain.planner.destinations import Destinations
from shardtrain.planner.executions import Execution
from shardtrain.planner.hlo import Computation, Instruction, Module
from shardtrain.planner.overlap import Overlaps
from shardtrain.planner.owners import Origins, Value
from shardtrain.planner.replica_groups import (
    groups_are_whole,
    parse_pairs,
    parse_replica_groups,
    varying_axes,
)
from shardtrain.planner.usage import is_loop_invariant, is_only_sliced, summed_pieces

_CHAIN = "frontend_attributes={chain_id="
_PASSED_ON = ("bitcast", "reshape", "copy", "pad", "get-tuple-element")


@dataclass(frozen=True)
class Layout:
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


def make_layout(
    names: Sequence[str], device_ids: np.ndarray, assignment: Sequence[int] | None
) -> Layout:
    """Where each logical device position is in a mesh; see `parse_collectives`.

    Raises:
        ValueError: names, mesh and assignment disagree.
    """
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
    return Layout(tuple(names), tuple(ids.shape), tuple(index[i] for i in order))


@dataclass(frozen=True)
class Flow:
    """Where values of one module come from and go to."""

    module: Module
    origins: Origins
    destinations: Destinations
    overlaps: Overlaps


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


def _overlapped_flops(flow: Flow, computation: Computation, node: Instruction) -> int:
    """Operations between start and end of one execution; a fused or wrapped one starts outside."""
    place = (computation, node)
    if not node.opcode.endswith("-start"):
        place = flow.origins.caller(computation.name) or place
    return flow.overlaps.of(*place)


def _slice_sizes(node: Instruction) -> list[tuple[int, ...]]:
    text = node.attributes.partition("slice_sizes={{")[2].partition("}}")[0]
    return [tuple(int(n) for n in part.split(",")) for part in text.split("},{")] if text else []


def _is_scattered(computation: Computation, node: Instruction) -> bool:
    """Whether a fused all-reduce is only sliced: how TPU programs spell reduce-scatter."""
    users = computation.users.get(node.name, ())
    while users and all(u.opcode in _PASSED_ON for u in users):
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


def _parameter(
    flow: Flow, computation: Computation, node: Instruction, pieces: list[Value] | None
) -> str:
    """The arguments that the operands come from, or that a reduction updates; "" if not known."""
    if pieces:
        found = [flow.origins.of(piece.computation, piece.node.name) for piece in pieces]
    else:
        found = [flow.origins.of(computation, name) for name in node.operands]
    names = [origin.argument if origin else "" for origin in found]
    if "" in names and not pieces and node.opcode.startswith(("all-reduce", "reduce-scatter")):
        each = range(len(names)) if len(names) > 1 else (None,)
        found_ahead = [flow.destinations.of(computation, node, element) for element in each]
        names = [name for name in found_ahead if name] or [""]
    return "" if "" in names else " + ".join(dict.fromkeys(names))


def _every(scopes: str) -> int:
    """How rarely a branch is taken, where the program says so in the name of a scope."""
    found = re.search(r"every_(\d+)_steps", scopes)
    return int(found.group(1)) if found else 1


def read_collective(
    flow: Flow, computation: Computation, node: Instruction, at: Execution, layout: Layout
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
    fused, pieces = at.fused_by, None
    if kind == "all-reduce":
        pieces = summed_pieces(flow.origins, computation, node, group_size)
    source = module.sources.locate(node.attributes)
    is_async = _is_async(node, at)
    scopes = node.operation_name or (fused.operation_name if fused else "")
    return Collective(
        kind=kind,
        bytes=size,
        axes=axes,
        count=at.count,
        is_async=is_async,
        source=source or (module.sources.locate(fused.attributes) if fused else ""),
        parameter=_parameter(flow, computation, node, pieces),
        operation_name=scopes,
        group_size=group_size,
        num_operands=num_operands,
        is_exact=at.is_exact,
        in_loop=at.in_loop,
        is_loop_invariant=kind == "all-gather"
        and at.in_loop
        and is_loop_invariant(flow.origins, computation, node),
        is_sum_of_pieces=pieces is not None,
        is_only_sliced=kind == "all-reduce"
        and is_only_sliced(module, computation, node, group_size),
        within=within,
        every=_every(scopes),
        overlapped_flops=at.count * _overlapped_flops(flow, computation, node) if is_async else 0,
    )
