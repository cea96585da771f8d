"""What one traced program does with its dims: the record that naming and the solver read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardtrain.partitioning.infer.atoms import Atoms, Dim
from shardtrain.partitioning.infer.source import source_line

Dims = list[Dim]


@dataclass(frozen=True)
class Contraction:
    """One dot, convolution or ragged dot: its work and the roles of its dims.

    `lhs_data`, `rhs_data`: whether the operand depends on the batch (else it is a weight).
    """

    flops: float
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    lhs_free: tuple[int, ...]
    rhs_free: tuple[int, ...]
    lhs_data: bool
    rhs_data: bool
    out_bytes: float
    rhs_contracted: tuple[int, ...] = ()  # the same classes as `contracted`, in the rhs's atoms
    kind: str = "dot"

    @property
    def weight(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(contracted, free) atoms of the weight operand; None unless exactly one is a weight."""
        if self.lhs_data == self.rhs_data:
            return None
        if self.lhs_data:
            return self.rhs_contracted, self.rhs_free
        return self.contracted, self.lhs_free

    @property
    def atoms(self) -> tuple[int, ...]:
        """All atoms the work is divided by when sharded."""
        return (*self.contracted, *self.batch, *self.lhs_free, *self.rhs_free)


@dataclass
class Partial:
    """A value that is a partial sum on each device when an atom of a term is sharded.

    Terms added together before any other use need one all-reduce between them.
    """

    terms: list[tuple[int, ...]]
    bytes: float
    eqn: Any
    outer: str
    merged: bool = False


@dataclass(frozen=True)
class Link:
    """Two dims of which one is cut or glued from the other (slice, split, concatenate, pad).

    `bytes` move once when both are sharded, and are gathered when only one is.
    """

    whole: tuple[int, ...]
    part: tuple[int, ...]
    bytes: float
    eqn: Any
    outer: str


@dataclass(frozen=True)
class Penalty:
    """An operation that needs these dims whole: sharded, `bytes` are gathered before it."""

    atoms: tuple[int, ...]
    bytes: float
    what: str


@dataclass(frozen=True)
class Opaque:
    """A primitive without a rule: no class crosses it."""

    primitive: str
    source: str

    def __str__(self) -> str:
        return f"{self.primitive} at {self.source}"


@dataclass
class DimGraph:
    """Everything learnt from one trace."""

    atoms: Atoms = field(default_factory=Atoms)
    arrays: list[tuple[Dims, float]] = field(default_factory=list)  # dims, bytes
    contractions: list[Contraction] = field(default_factory=list)
    partials: list[Partial] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    penalties: list[Penalty] = field(default_factory=list)
    opaque: list[Opaque] = field(default_factory=list)
    indexed: list[tuple[Dim, bool, bool]] = field(default_factory=list)  # dim; table, index of data
    scanned: list[Dim] = field(default_factory=list)  # lengths of scans
    residual: list[Dim] = field(default_factory=list)  # last dims of additions of two data values
    ranked: list[Dim] = field(default_factory=list)  # dims of a top-k
    spatial: list[Dims] = field(default_factory=list)  # spatial dims of convolution results
    grouped: list[Dim] = field(default_factory=list)  # group dims of ragged dots


@dataclass
class Site:
    """One equation being interpreted: what its rule may record."""

    graph: DimGraph
    eqn: Any
    outer: str
    times: float  # how often the equation runs in one call of the program
    in_data: tuple[bool, ...]
    partial: Partial | None = None

    @property
    def source(self) -> str:
        """File and line of the equation."""
        return source_line(self.eqn, self.outer)

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    def shape(self, i: int) -> tuple[int, ...]:
        """Shape of operand `i`."""
        return self.eqn.invars[i].aval.shape

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """Shape of result `i`."""
        return self.eqn.outvars[i].aval.shape

    def fresh(self, size: int) -> Dim:
        """A new unrelated dim."""
        return self.graph.atoms.fresh(size)

    def unify(self, one: Sequence[int], two: Sequence[int]) -> None:
        """The two dims are the same logical dim."""
        if one is two:
            return
        if not self.graph.atoms.unify(one, two, self.eqn, self.outer):
            self.need_whole([*one, *two], self.out_bytes(), "dims that factor differently meet")

    def out_bytes(self, i: int = 0) -> float:
        """Bytes of result `i` over all runs."""
        return nbytes(self.eqn.outvars[i].aval) * self.times

    def in_bytes(self, i: int = 0) -> float:
        """Bytes of operand `i` over all runs."""
        return nbytes(self.eqn.invars[i].aval) * self.times

    def reduces(self, dim: Sequence[int], *, linear: bool = True) -> None:
        """The result is a partial sum (or max) where `dim` is sharded."""
        if not dim:
            return
        made = Partial([tuple(dim)], self.out_bytes(), self.eqn, self.outer)
        self.graph.partials.append(made)
        self.partial = made if linear else None

    def link(self, whole: Dim, part: Dim, moved: float) -> None:
        """`part` is cut out of `whole`, or glued into it."""
        if whole and part:
            made = Link(tuple(whole), tuple(part), moved, self.eqn, self.outer)
            self.graph.links.append(made)

    def need_whole(self, dim: Sequence[int], gathered: float, what: str) -> None:
        """The dim is gathered first when it is sharded."""
        if dim:
            self.graph.penalties.append(Penalty(tuple(dim), gathered, f"{what} ({self.source})"))

    def block(self, dim: Sequence[int], what: str) -> None:
        """The dim is never sharded."""
        self.graph.atoms.block(dim, f"{what} ({self.source})")


def nbytes(aval: Any) -> float:
    """Bytes of an array (keys and tokens count as their element count)."""
    size = 1
    for d in getattr(aval, "shape", ()):
        size *= d
    return size * getattr(getattr(aval, "dtype", None), "itemsize", 1)
