"""Batch rules of primitives that move, cut and make dims, for `batch_independence`."""

import math

from shardtrain.partitioning.infer.batch_value import (
    SUM,
    ZERO,
    Kind,
    Op,
    Rule,
    Value,
    examples,
    without,
)


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
        return [Value(v.kind, without(v.dim, op.params["dimensions"]))]
    return [v]


def concatenate(op: Op) -> list[Value]:
    """Along another dim than the batch."""
    axis = op.params.get("dimension", op.params.get("axis"))
    if any(v.kind is Kind.POSITION for v in op.ins):
        return [_columns(op, axis)]
    stacked = op.name == "stack"
    dims = {v.dim + (stacked and v.dim >= axis) for v in op.ins if v.per_example}
    if len(dims) == 1 and (stacked or axis not in dims) and not op.has_sum:
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


def _all_linear(op: Op) -> Value:
    if all(v.kind is Kind.ZERO for v in op.ins):
        return ZERO
    if all(v.additive for v in op.ins):
        return SUM
    if op.has_sum:
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


BATCH_SHAPE_RULES: dict[str, Rule] = {
    "concatenate": concatenate,
    "stack": concatenate,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "pad": pad,
    "slice": slice_,
    "tile": tile,
    "iota": iota,
}
