"""What a compiled program communicates: kind, bytes, mesh axes, executions, source.

The optimised HLO is the one place where all communication of a step is written down, whoever asked
for it (the user, a sharding constraint, XLA's partitioner).
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from shardtrain.planner.collective import KINDS, UNKNOWN_AXES, Collective
from shardtrain.planner.collective_reader import Flow, make_layout, read_collective
from shardtrain.planner.destinations import Destinations
from shardtrain.planner.executions import count_executions
from shardtrain.planner.hlo import Module, parse_hlo
from shardtrain.planner.overlap import Overlaps
from shardtrain.planner.owners import Origins

__all__ = [
    "KINDS",
    "UNKNOWN_AXES",
    "Collective",
    "collectives_in",
    "collectives_of",
    "device_assignment",
    "merge_collectives",
    "parse_collectives",
]


def merge_collectives(collectives: Sequence[Collective]) -> list[Collective]:
    """One row for collectives that differ only in what is added up (`count`, `overlapped_flops`)
    and in `operation_name`, of which the first is kept.
    """
    rows: dict[Collective, Collective] = {}
    for item in collectives:
        key = dataclasses.replace(item, count=0, operation_name="", overlapped_flops=0)
        if key not in rows:
            rows[key] = item
            continue
        count = rows[key].count + item.count
        flops = rows[key].overlapped_flops + item.overlapped_flops
        rows[key] = dataclasses.replace(rows[key], count=count, overlapped_flops=flops)
    return list(rows.values())


def collectives_in(
    module: Module,
    axis_names: Sequence[str],
    device_ids: np.ndarray,
    assignment: Sequence[int] | None = None,
) -> list[Collective]:
    """All collectives of a parsed module, merged. Arguments as `parse_collectives`."""
    layout = make_layout(axis_names, device_ids, assignment)
    executions = count_executions(module)
    flow = Flow(module, Origins(module), Destinations(module), Overlaps(module))
    found = []
    for name, computation in module.computations.items():
        at = executions.get(name)
        if at is None or at.count == 0:
            continue
        for node in computation.instructions:
            item = read_collective(flow, computation, node, at, layout)
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
