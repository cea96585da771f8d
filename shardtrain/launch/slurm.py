"""The two small list notations of SLURM."""

import re

from shardtrain.errors import DistributedError


def first_host(node_list: str) -> str:
    """First host of a node list.

    Example:
      >>> first_host("gpu[007,009-012]-ib,login1")
      'gpu007-ib'
      >>> first_host("node1,node2")
      'node1'
    """
    match = re.match(r"([^,\[\]]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[\]]*)", node_list)
    if match is None:
        raise DistributedError(f"SLURM node list {node_list!r} is not understood")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix


def tasks_per_node(text: str) -> tuple[int, ...]:
    """Tasks on each node.

    Example:
      >>> tasks_per_node("2(x3),1")
      (2, 2, 2, 1)
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise DistributedError(f"SLURM tasks per node {text!r} is not understood")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)
