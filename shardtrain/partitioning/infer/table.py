"""The logical axes of a model: `infer_axes` and the table it returns."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from shardtrain.partitioning.infer.atoms import Tie
from shardtrain.partitioning.infer.dim_graph import DimGraph, Opaque
from shardtrain.partitioning.infer.naming import Leaf, Namer
from shardtrain.partitioning.infer.source import source_line
from shardtrain.partitioning.infer.trace import trace
from shardtrain.partitioning.infer.walk import Traced, Walk


@dataclass(frozen=True)
class AxisRow:
    """The logical axes of one leaf.

    `axes` and `classes` have one entry per dim: a tuple of names (class ids), major to minor,
    since a dim may be a product such as `("heads", "head_dim")`; empty for dims of size 1.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    classes: tuple[tuple[int, ...], ...]
    bytes: int

    def __str__(self) -> str:
        dims = ", ".join("*".join(names) or "1" for names in self.axes)
        return f"{self.path} {self.shape}: ({dims})"


@dataclass(frozen=True)
class AxisTable:
    """What `infer_axes` found: logical axes of parameters and inputs, and the evidence."""

    rows: tuple[AxisRow, ...]
    inputs: tuple[AxisRow, ...]
    opaque: tuple[Opaque, ...]
    names: dict[int, str] = field(repr=False)  # class id → name
    graph: DimGraph = field(repr=False)
    leaves: tuple[Leaf, ...] = field(repr=False)
    has_gradient: bool = True

    def row(self, path: str) -> AxisRow:
        """The row of one parameter or input; `KeyError` when there is none."""
        for row in (*self.rows, *self.inputs):
            if row.path == path:
                return row
        raise KeyError(path)

    def size(self, class_id: int) -> int:
        """Number of elements of a class."""
        return self.graph.atoms.size[class_id]

    def why(self, path: str) -> str:
        """The equations, with source lines, that tied each dim of a parameter to its class.

        Args:
          path: of a parameter or input, as in `rows`.

        Returns:
          Text, one paragraph per dim: its name, and for the nearest dims it is the same as, the
          chain of equations between them.
        """
        row = self.row(path)
        dims = next(dims for p, _, dims in self.leaves if p == path)
        owners = owners_of(self.graph, self.leaves)
        near = _neighbours(self.graph.atoms.ties)
        out = [str(row)]
        for axis, dim in enumerate(dims):
            for atom, name in zip(self.graph.atoms.leaves(dim), row.axes[axis], strict=True):
                out.append(f"  dim {axis} {name}:")
                chains = _chains(atom, path, owners, near)
                out += chains or ["    tied to no other parameter or input"]
        return "\n".join(out)

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.rows, *self.inputs)))


def infer_axes(fn: Callable[..., Any], params: Any, *args: Any, grad: bool = True) -> AxisTable:
    """Discover the logical axes of an unmodified model.

    The loss is traced with abstract arrays; every primitive says which dims of its operands and
    results are the same, and reshapes split dims into factors. Each class of dims is a logical
    axis, named from what the program does with it.

    Args:
      fn: `fn(params, *args)` returns a scalar loss or a pytree of losses and metrics.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      *args: batch and other arguments, arrays or `jax.ShapeDtypeStruct`; the first dim of each
        is taken to be the batch. The paths of a single argument's leaves are its own; with
        several, they begin with the argument's number.
      grad: also trace the gradient, which the solver needs to count communication.

    Returns:
      `AxisTable`. Nothing is allocated or compiled.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
      >>> mlp = lambda w, x: (jax.nn.relu(x @ w["up"]) @ w["down"]).sum()
      >>> table = infer_axes(mlp, {"up": shape(8, 32), "down": shape(32, 8)}, shape(4, 8))
      >>> table.row("up").axes
      (('features',), ('mlp',))
    """
    program = trace(fn, params, args, grad=grad)
    graph = DimGraph()
    leaves: list[Leaf] = []
    ins = []
    for data, named in ((False, program.params), (True, program.inputs)):
        for path, array in named:
            dims = [graph.atoms.fresh(s) for s in array.shape]
            leaves.append((path, array, dims))
            graph.arrays.append((dims, array.size * array.dtype.itemsize))
            ins.append(Traced(dims, data))
    batch = [dims for _, _, dims in leaves[len(program.params) :] if dims]
    outs = Walk(graph, batch).run(program.jaxpr, ins, "<unknown>", 1.0)
    if program.has_gradient:
        _tie_gradients(graph, ins, leaves, outs, len(program.params))
    count = len(program.params)
    names = Namer(graph, leaves[:count], leaves[count:]).run()
    rows = [_row(graph, names, leaf) for leaf in leaves]
    return AxisTable(
        rows=tuple(rows[:count]),
        inputs=tuple(rows[count:]),
        opaque=tuple(dict.fromkeys(graph.opaque)),
        names=names,
        graph=graph,
        leaves=tuple(leaves),
        has_gradient=program.has_gradient,
    )


def _tie_gradients(
    graph: DimGraph, ins: list[Traced], leaves: list[Leaf], outs: list[Traced], count: int
) -> None:
    """A gradient has the dims of its parameter (the optimizer adds them)."""
    floats = [i for i in range(count) if jnp.issubdtype(leaves[i][1].dtype, jnp.floating)]
    for i, grad in zip(reversed(floats), reversed(outs), strict=False):
        for one, two in zip(ins[i].dims, grad.dims, strict=True):
            graph.atoms.unify(one, two, None, "the gradient of the parameter")


def _row(graph: DimGraph, names: dict[int, str], leaf: Leaf) -> AxisRow:
    path, array, dims = leaf
    classes = tuple(graph.atoms.roots(d) for d in dims)
    axes = tuple(tuple(names[r] for r in c) for c in classes)
    return AxisRow(path, tuple(array.shape), axes, classes, array.size * array.dtype.itemsize)


def owners_of(graph: DimGraph, leaves: Sequence[Leaf]) -> dict[int, tuple[str, int]]:
    """Atom → (path, dim) of the leaf it was made for."""
    owners: dict[int, tuple[str, int]] = {}
    for path, _, dims in leaves:
        for axis, dim in enumerate(dims):
            for atom in (*dim, *graph.atoms.leaves(dim)):
                owners.setdefault(atom, (path, axis))
    return owners


def _neighbours(ties: Sequence[Tie]) -> dict[int, list[tuple[int, Tie]]]:
    near: dict[int, list[tuple[int, Tie]]] = {}
    for tie in ties:
        if not tie.refines:
            near.setdefault(tie.a, []).append((tie.b, tie))
            near.setdefault(tie.b, []).append((tie.a, tie))
    return near


def _chains(atom: int, path: str, owners: dict, near: dict, limit: int = 3) -> list[str]:
    """Breadth-first from an atom to the nearest dims of other leaves, with the ties between."""
    found, seen = [], {atom}
    queue: deque[tuple[int, tuple[Tie, ...]]] = deque([(atom, ())])
    while queue and len(found) < limit:
        here, chain = queue.popleft()
        owner = owners.get(here)
        if owner and owner[0] != path and chain:
            steps = "; ".join(_step(t) for t in chain)
            found.append(f"    = {owner[0]} dim {owner[1]}, by {steps}")
        for there, tie in near.get(here, ()):
            if there not in seen:
                seen.add(there)
                queue.append((there, (*chain, tie)))
    return found


def _step(tie: Tie) -> str:
    if tie.eqn is None:
        return tie.outer
    return f"{tie.eqn.primitive.name} at {source_line(tie.eqn, tie.outer)}"
