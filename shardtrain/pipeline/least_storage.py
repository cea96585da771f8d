"""The fewest bytes to store so that a later part of a program can be computed.

Elementwise functions and changes of shape cost next to nothing to compute again, so a value that
follows by them from stored ones need not be stored. Which values to store is a minimum cut between
all that is expensive to compute and all that is wanted, each value's capacity its bytes.

Source of the idea: min-cut rematerialisation, as in PyTorch's AOTAutograd partitioner. Maximum
flow: Edmonds and Karp, 1972.
"""

import collections
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.extend.core as jex

from shardtrain.partitioning.infer.primitive_names import ELEMENTWISE
from shardtrain.pipeline.jaxprs import variables

# Not cheap: special functions, and what says something about devices or random numbers.
_COSTLY = frozenset(
    (
        *("bessel_i0e", "bessel_i1e", "digamma", "igamma", "igamma_grad_a", "igammac", "lgamma"),
        *("polygamma", "regularized_incomplete_beta", "zeta"),
        *("random_fold_in", "random_seed", "sharding_constraint"),
    )
)
CHEAP = (ELEMENTWISE - _COSTLY) | {
    *("broadcast_in_dim", "concatenate", "expand_dims", "iota", "reshape", "slice", "split"),
    *("squeeze", "transpose"),
}
_Node = tuple[Any, bool]  # a value and the side of it: False before, True behind its capacity
_SOURCE: _Node = ("source", True)
_SINK: _Node = ("sink", False)


def is_cheap(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation may be computed again rather than have its results stored."""
    return eqn.primitive.name in CHEAP


def least_storage(
    eqns: Sequence[jex.JaxprEqn],
    available: Collection[Any],
    wanted: Iterable[Any],
    nbytes: Callable[[Any], int],
) -> set[Any]:
    """The values to store so that `wanted` follow from them and `available` by cheap equations.

    Of several equally small choices the one nearest to `wanted`, where least is computed again.

    Args:
        eqns: the program that computes them.
        available: values that need no storage.
        wanted: what has to be known.
        nbytes: what storing a value costs.
    """
    capacity: dict[_Node, dict[_Node, float]] = collections.defaultdict(dict)
    maker = {v: eqn for eqn in eqns for v in eqn.outvars}
    todo, seen = [v for v in wanted if v not in available], set()
    for var in todo:
        _join(capacity, (var, True), _SINK, float("inf"))
    while todo:
        var = todo.pop()
        if var in seen:
            continue
        seen.add(var)
        _join(capacity, (var, False), (var, True), nbytes(var))
        eqn = maker.get(var)
        if eqn is None or not is_cheap(eqn):
            _join(capacity, _SOURCE, (var, False), float("inf"))
            continue
        for operand in set(variables(eqn.invars)) - set(available):
            _join(capacity, (operand, True), (var, False), float("inf"))
            todo.append(operand)
    _fill(capacity)
    behind = _reached(_reverse(capacity), _SINK)
    return {var for var in seen if (var, True) in behind and (var, False) not in behind}


def _join(capacity: dict, a: _Node, b: _Node, size: float) -> None:
    capacity[a][b] = size
    capacity[b].setdefault(a, 0)


def _fill(capacity: dict[_Node, dict[_Node, float]]) -> None:
    """Send flow along shortest paths until none is left; `capacity` becomes what remains."""
    while True:
        back = _reached(capacity, _SOURCE)
        if _SINK not in back:
            return
        path, node = [], _SINK
        while node != _SOURCE:
            path.append((back[node], node))
            node = back[node]
        size = min(capacity[a][b] for a, b in path)
        for a, b in path:
            capacity[a][b] -= size
            capacity[b][a] += size


def _reached(capacity: Mapping[_Node, Mapping[_Node, float]], start: _Node) -> dict[_Node, _Node]:
    """Every node that can be reached, and from where it was."""
    back, todo = {start: start}, collections.deque([start])
    while todo:
        node = todo.popleft()
        for other, size in capacity.get(node, {}).items():
            if size > 0 and other not in back:
                back[other] = node
                todo.append(other)
    return back


def _reverse(capacity: Mapping[_Node, Mapping[_Node, float]]) -> dict[_Node, dict[_Node, float]]:
    turned: dict[_Node, dict[_Node, float]] = collections.defaultdict(dict)
    for a, edges in capacity.items():
        for b, size in edges.items():
            turned[b][a] = size
    return turned
