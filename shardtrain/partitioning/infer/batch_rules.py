"""Batch rules of elementwise, shape and reduction primitives for `batch_independence`."""

import math
from collections.abc import Callable

from shardtrain.partitioning.infer import primitive_names as names
from shardtrain.partitioning.infer.batch_value import SUM, ZERO, Kind, Op, Value, examples

Rule = Callable[[Op], list[Value]]

_ADDITIVE = frozenset({"add", "sub", "add_any", "select_n"})
_LINEAR = frozenset(
    {"neg", "real", "imag", "copy", "copy_p", "stop_gradient", "name", "sharding_constraint"}
)


def elementwise(op: Op) -> list[Value]:
    """Every operand has the output's shape, size-1 dims or rank 0."""
    if op.name == "select_n" and op.ins[0].kind is Kind.NEVER:
        return [op.ins[1]]
    for v in op.ins:
        if v.kind is Kind.MIXED:
            return [v]
    if any(v.kind in (Kind.POSITION, Kind.COLUMNS) for v in op.ins):
        return [_position(op)]
    if any(v.kind is Kind.SUM for v in op.ins):
        return [_of_sums(op)]
    dims = {v.dim for v in op.ins if v.per_example}
    if len(dims) > 1:
        return [op.mixed("pairs every example with every other (batch dims meet elementwise)")]
    if dims:
        return [examples(dims.pop())]
    zero = all(v.kind is Kind.ZERO for v in op.ins) and (
        op.name in _ADDITIVE | _LINEAR or _is_cast(op)
    )
    return [ZERO if zero else Value(Kind.SAME)]


def _position(op: Op) -> Value:
    others = [v for v in op.ins if v.kind is not Kind.POSITION]
    if len(op.ins) - len(others) == 1:
        position = next(v for v in op.ins if v.kind is Kind.POSITION)
        if op.name == "convert_element_type":
            return position
        if op.name == "lt" and op.ins[0] is position and others[0].kind is Kind.ZERO:
            return Value(Kind.NEVER, position.dim)
    return op.mixed("uses the position of each example in the batch (an arange over the batch)")


def _is_cast(op: Op) -> bool:
    """A conversion that keeps sums: not to integers or booleans from floats."""
    if op.name not in ("convert_element_type", "reduce_precision"):
        return False
    old, new = (avals[0].dtype for avals in (op.in_avals[0], op.out_avals[0]))
    return new.kind in "fcV" or (old.kind == new.kind and new.kind != "b")


def _of_sums(op: Op) -> Value:
    """Only linear maps keep a batch sum a batch sum."""
    if any(v.per_example for v in op.ins):
        return op.mixed(
            f"`{op.name}` combines a sum over the batch with per-example values"
            " (as batch normalisation does)"
        )
    first, *rest = op.ins
    if op.name in _LINEAR or _is_cast(op):
        return SUM
    if op.name == "select_n" and first.same and all(v.additive for v in rest):
        return SUM
    if op.name in ("add", "sub", "add_any"):
        if all(v.additive for v in op.ins):
            return SUM
        return op.mixed(
            "adds a term that does not depend on the batch to a sum over the batch"
            " (it would be counted once per part)"
        )
    if op.name == "mul" and (first.same or rest[0].same):
        return SUM
    if op.name == "div" and first.additive and rest[0].same:
        return SUM
    if op.name == "div":
        size = rest[0].reason
        what = f"a mean over the batch: divides by {size}" if size else "divides by a batch sum"
        return op.mixed(f"{what}, so the parts do not add up")
    return op.mixed(f"`{op.name}` of a sum over the batch is not linear")


def reduce_sum(op: Op) -> list[Value]:
    """Sums over the batch become `SUM`."""
    (v,) = op.ins
    if not v.per_example:
        return [v]
    return [SUM] if v.dim in op.params["axes"] else [examples(_after(v.dim, op.params["axes"]))]


def reduce_other(op: Op) -> list[Value]:
    """max, min, prod, and, or, argmax: fine within examples only."""
    axes = op.params.get("axes", op.params.get("dimensions"))
    out = []
    for v in op.ins:
        if v.kind is Kind.SUM:
            out.append(op.mixed(f"`{op.name}` of a sum over the batch is not linear"))
        elif v.per_example and v.dim in axes:
            out.append(op.mixed(f"`{op.name}` over the batch does not add up"))
        else:
            out.append(examples(_after(v.dim, axes)) if v.per_example else Value(Kind.SAME))
    bad = next((v for v in out if v.kind is Kind.MIXED), None)
    best = bad or next((v for v in out if v.per_example), out[0])
    return [best] * len(op.out_avals)


def _after(dim: int, removed: tuple[int, ...]) -> int:
    return dim - sum(a < dim for a in removed)


def broadcast_in_dim(op: Op) -> list[Value]:
    """A value repeated for every example is a per-example value."""
    (v, *_), scaled = op.ins, op.scaled()
    if v.per_example or v.kind is Kind.POSITION:
        return [Value(v.kind, op.params["broadcast_dimensions"][v.dim])]
    if scaled and v.same and len(scaled) == 1:
        return [examples(scaled[0])]
    if scaled:
        return [op.mixed("gives a sum over the batch back to the examples")]
    return [v]


def reshape(op: Op) -> list[Value]:
    """The batch must stay the major part of its dim: (B, T) -> (B*T,) and back, not (T, B)."""
    v = op.ins[0]
    if not v.per_example and v.kind is not Kind.POSITION:
        return [v]
    scaled = op.scaled()
    if len(scaled) == 1:
        before = math.prod(op.in_shape(0)[: v.dim])
        if before == math.prod(op.out_avals[0][0].shape[: scaled[0]]):
            kind = v.kind if op.out_avals[0][0].shape[scaled[0]] == op.sizes[0] else Kind.EXAMPLES
            if v.kind is Kind.POSITION and kind is not Kind.POSITION:
                return [op.mixed("reshapes an arange over the batch")]
            return [Value(kind, scaled[0])]
    return [op.mixed(f"reshape to {op.out_avals[0][0].shape} mixes the batch with another dim")]


def transpose(op: Op) -> list[Value]:
    """Moves the batch dim."""
    (v,) = op.ins
    if v.per_example or v.kind is Kind.POSITION:
        return [Value(v.kind, op.params["permutation"].index(v.dim))]
    return [v]


def squeeze(op: Op) -> list[Value]:
    """Drops size-1 dims (the batch dim grows, so it is none of them)."""
    (v,) = op.ins
    if v.per_example or v.kind is Kind.POSITION:
        return [Value(v.kind, _after(v.dim, op.params["dimensions"]))]
    return [v]


def concatenate(op: Op) -> list[Value]:
    """Along another dim than the batch."""
    axis = op.params.get("dimension", op.params.get("axis"))
    if any(v.kind is Kind.POSITION for v in op.ins):
        return [_columns(op, axis)]
    stacked = op.name == "stack"
    dims = {v.dim + (stacked and v.dim >= axis) for v in op.ins if v.per_example}
    if len(dims) == 1 and (stacked or axis not in dims) and not _has_sum(op):
        return [examples(dims.pop())]
    if not dims:
        return [_all_linear(op)]
    return [op.mixed("concatenates along the batch, or joins sums and per-example values")]


def _columns(op: Op, axis: int) -> Value:
    dims = {v.dim for v in op.ins if v.per_example or v.kind is Kind.POSITION}
    one_wide = all(shape[axis] == 1 for shape in (a[0].shape for a in op.in_avals))
    last = axis == len(op.out_avals[0][0].shape) - 1
    if op.name == "concatenate" and len(dims) == 1 and one_wide and last:
        columns = frozenset(i for i, v in enumerate(op.ins) if v.kind is Kind.POSITION)
        return Value(Kind.COLUMNS, dims.pop(), columns)
    return op.mixed("uses the position of each example in the batch (an arange over the batch)")


def _has_sum(op: Op) -> bool:
    return any(v.kind is Kind.SUM for v in op.ins)


def _all_linear(op: Op) -> Value:
    if all(v.kind is Kind.ZERO for v in op.ins):
        return ZERO
    if all(v.additive for v in op.ins):
        return SUM
    if _has_sum(op):
        return op.mixed("joins a sum over the batch with a value that does not depend on it")
    return Value(Kind.SAME)


def pad(op: Op) -> list[Value]:
    """Other dims than the batch."""
    v, fill = op.ins
    if v.per_example and fill.same:
        if tuple(op.params["padding_config"][v.dim]) != (0, 0, 0):
            return [op.mixed("pads the batch")]
        return [examples(v.dim)]
    return [_all_linear(op)]


def slice_(op: Op) -> list[Value]:
    """All examples, or none."""
    (v,) = op.ins
    if not v.per_example:
        return [v] if v.kind is not Kind.POSITION else [op.mixed("slices an arange over the batch")]
    steps = op.params["strides"] or (1,) * (v.dim + 1)
    whole = op.params["limit_indices"][v.dim] == op.in_shape(0)[v.dim]
    if op.params["start_indices"][v.dim] == 0 and whole and steps[v.dim] == 1:
        return [examples(v.dim)]
    return [op.mixed("takes some of the examples of the batch (a slice of the batch dim)")]


def along_axis(op: Op) -> list[Value]:
    """sort, cumulative ops, top_k, split, unstack, rev, fft: must leave the batch dim alone."""
    p, rank = op.params, len(op.in_shape(0))
    axes = p.get("dimensions", (p.get("dimension", p.get("axis")),))
    if "fft_lengths" in p:
        axes = tuple(range(rank - len(p["fft_lengths"]), rank))
    dims = {v.dim for v in op.ins if v.per_example}
    if dims and (len(dims) > 1 or dims & set(axes)):
        return [op.mixed(f"`{op.name}` along the batch dim")] * len(op.out_avals)
    if _has_sum(op):
        if dims or op.name not in ("cumsum", "rev", "split", "unstack"):
            return [op.mixed(f"`{op.name}` of a sum over the batch")] * len(op.out_avals)
        return [SUM] * len(op.out_avals)
    if not dims:
        return [Value(Kind.SAME)] * len(op.out_avals)
    dim = dims.pop()
    return [examples(dim - (op.name == "unstack" and axes[0] < dim))] * len(op.out_avals)


def tile(op: Op) -> list[Value]:
    """Repeats other dims, or makes one copy per example of a size-1 dim."""
    (v,), scaled = op.ins, op.scaled()
    if v.per_example and op.params["reps"][v.dim] == 1:
        return [v]
    if v.same and len(scaled) == 1 and op.in_shape(0)[scaled[0]] == 1:
        return [examples(scaled[0])]
    if v.per_example or scaled:
        return [op.mixed("tiles along the batch")]
    return [v]


def iota(op: Op) -> list[Value]:
    """An arange over the batch gives positions; over other dims it is the same for each example."""
    scaled, axis = op.scaled(), op.params["dimension"]
    if not scaled:
        return [Value(Kind.SAME)]
    if scaled == (axis,):
        return [Value(Kind.POSITION, axis)]
    return [examples(scaled[0])]


def random_bits(op: Op) -> list[Value]:
    """Draws shaped by the batch differ when the batch is split."""
    if _has_sum(op):
        return [op.mixed("random numbers seeded by a sum over the batch")]
    if op.ins and op.ins[0].per_example:
        return [op.ins[0]]
    scaled = op.scaled()
    if not scaled:
        return [Value(Kind.SAME)]
    if op.ignore_random and len(scaled) == 1:
        return [examples(scaled[0])]
    return [op.mixed("random numbers are drawn for the whole batch at once (as dropout does)")]


def random_wrap(op: Op) -> list[Value]:
    """Keys gain or lose a trailing dim."""
    return [op.ins[0] if not _has_sum(op) else op.mixed("a random key made of a batch sum")]


def passthrough(op: Op) -> list[Value]:
    """One output per operand, unchanged."""
    return list(op.ins)


# The rules that know what to do with an arange over the batch; elsewhere it is MIXED.
POSITION_RULES = frozenset(
    {elementwise, broadcast_in_dim, reshape, transpose, squeeze, concatenate}
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(names.ELEMENTWISE, elementwise),
    **dict.fromkeys(names.REDUCE_NOT_SUM, reduce_other),
    **dict.fromkeys(names.ALONG_AXIS, along_axis),
    **dict.fromkeys(names.RANDOM_KEYS, random_wrap),
    **dict.fromkeys(names.PASSTHROUGH, passthrough),
    **dict.fromkeys(names.RANDOM, random_bits),
    "concatenate": concatenate,
    "stack": concatenate,
    "reduce_sum": reduce_sum,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "pad": pad,
    "slice": slice_,
    "tile": tile,
    "iota": iota,
}
