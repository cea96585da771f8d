"""What a traced value is with respect to the batch: the lattice of `batch_independence`."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Kind(enum.Enum):
    """How the value computed on a part of the batch relates to the value on the whole batch."""

    ZERO = "zero"  # all zeros: at once SAME and SUM
    SAME = "same"  # equal on every part: does not depend on the batch
    EXAMPLES = "examples"  # a part's value is the rows of `dim` that belong to its examples
    NEVER = "never"  # EXAMPLES, and False everywhere
    POSITION = "position"  # row b of `dim` holds b, the place of the example in the batch
    COLUMNS = "columns"  # gather indices: `columns` hold POSITION, the others are EXAMPLES
    SUM = "sum"  # the parts' values add up to the whole value
    MIXED = "mixed"  # none of these, or not known; `reason` and `source` say why


@dataclass(frozen=True)
class Value:
    """One abstract value. `dim` is the array dim the batch is the major part of."""

    kind: Kind
    dim: int = -1
    columns: frozenset[int] = frozenset()
    reason: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def per_example(self) -> bool:
        """A part's value is the matching rows of the whole value."""
        return self.kind in (Kind.EXAMPLES, Kind.NEVER)

    @property
    def same(self) -> bool:
        """Equal on every part."""
        return self.kind in (Kind.SAME, Kind.ZERO)

    @property
    def additive(self) -> bool:
        """The parts' values add up to the whole value."""
        return self.kind in (Kind.SUM, Kind.ZERO)


ZERO = Value(Kind.ZERO)
SAME = Value(Kind.SAME)
SUM = Value(Kind.SUM)


def examples(dim: int) -> Value:
    """Rows of `dim` belong to examples."""
    return Value(Kind.EXAMPLES, dim)


def mixed(reason: str, source: str = "") -> Value:
    """A value that couples examples, or about which nothing is known."""
    return Value(Kind.MIXED, reason=reason, source=source)


def join(a: Value, b: Value, source: str = "") -> Value:
    """The best description that holds for both (loop carries, branches of a `cond`)."""
    if a == b or b.kind is Kind.ZERO or a.kind is Kind.MIXED:
        return a
    if a.kind is Kind.ZERO or b.kind is Kind.MIXED:
        return b
    if a.per_example and b.per_example and a.dim == b.dim:
        return examples(a.dim)
    return mixed(f"one path gives {describe(a)}, another {describe(b)}", source)


def describe(value: Value) -> str:
    """Words for error sentences."""
    return {
        Kind.ZERO: "zeros",
        Kind.SAME: "a value that does not depend on the batch",
        Kind.EXAMPLES: f"a per-example value (batch in dim {value.dim})",
        Kind.NEVER: f"a per-example value (batch in dim {value.dim})",
        Kind.POSITION: "the position of each example in the batch",
        Kind.COLUMNS: "the position of each example in the batch",
        Kind.SUM: "a sum over the batch",
        Kind.MIXED: value.reason,
    }[value.kind]


@dataclass(frozen=True)
class Op:
    """One equation seen in two traces of the same function, at batch sizes `sizes`.

    A dim whose size differs between the traces is one that grows with the batch; a parameter or
    number that differs depends on the batch size.
    """

    name: str
    params: dict[str, Any]
    params2: dict[str, Any]
    ins: tuple[Value, ...]
    in_avals: tuple[tuple[Any, Any], ...]
    out_avals: tuple[tuple[Any, Any], ...]
    sizes: tuple[int, int]
    source: str
    ignore_random: bool = False

    def in_shape(self, i: int) -> tuple[int, ...]:
        """Shape of operand `i` in the first trace."""
        return self.in_avals[i][0].shape

    def scaled(self, i: int = 0) -> tuple[int, ...]:
        """Dims of output `i` that grow with the batch."""
        return scaled_dims(self.out_avals[i])

    @property
    def has_sum(self) -> bool:
        """Whether an operand is a sum over the batch."""
        return any(v.kind is Kind.SUM for v in self.ins)

    def mixed(self, reason: str) -> Value:
        """`MIXED` at this equation."""
        return mixed(reason, self.source)


def scaled_dims(avals: tuple[Any, Any]) -> tuple[int, ...]:
    """Dims whose size differs between the two traces."""
    one, two = (getattr(a, "shape", ()) for a in avals)
    return tuple(d for d, (m, n) in enumerate(zip(one, two, strict=True)) if m != n)


def without(dim: int, removed: tuple[int, ...]) -> int:
    """Where a dim is after others were removed."""
    return dim - sum(a < dim for a in removed)


Rule = Callable[[Op], list[Value]]
