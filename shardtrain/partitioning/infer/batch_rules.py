"""Batch rules of elementwise, reducing, ordering and random primitives."""

from shardtrain.partitioning.infer import primitive_names as names
from shardtrain.partitioning.infer.batch_shapes import (
    BATCH_SHAPE_RULES,
    broadcast_in_dim,
    concatenate,
    reshape,
    squeeze,
    transpose,
)
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
    return [SUM] if v.dim in op.params["axes"] else [examples(without(v.dim, op.params["axes"]))]


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
            out.append(examples(without(v.dim, axes)) if v.per_example else Value(Kind.SAME))
    bad = next((v for v in out if v.kind is Kind.MIXED), None)
    best = bad or next((v for v in out if v.per_example), out[0])
    return [best] * len(op.out_avals)


def along_axis(op: Op) -> list[Value]:
    """sort, cumulative ops, top_k, split, unstack, rev, fft: must leave the batch dim alone."""
    p, rank = op.params, len(op.in_shape(0))
    axes = p.get("dimensions", (p.get("dimension", p.get("axis")),))
    if "fft_lengths" in p:
        axes = tuple(range(rank - len(p["fft_lengths"]), rank))
    dims = {v.dim for v in op.ins if v.per_example}
    if dims and (len(dims) > 1 or dims & set(axes)):
        return [op.mixed(f"`{op.name}` along the batch dim")] * len(op.out_avals)
    if op.has_sum:
        if dims or op.name not in ("cumsum", "rev", "split", "unstack"):
            return [op.mixed(f"`{op.name}` of a sum over the batch")] * len(op.out_avals)
        return [SUM] * len(op.out_avals)
    if not dims:
        return [Value(Kind.SAME)] * len(op.out_avals)
    dim = dims.pop()
    return [examples(dim - (op.name == "unstack" and axes[0] < dim))] * len(op.out_avals)


def random_bits(op: Op) -> list[Value]:
    """Draws shaped by the batch differ when the batch is split."""
    if op.has_sum:
        return [op.mixed("random numbers seeded by a sum over the batch")]
    if op.ins and op.ins[0].per_example:
        return [op.ins[0]]
    scaled = op.scaled()
    if not scaled:
        return [Value(Kind.SAME)]
    if op.ignore_random and op.name in names.DRAWS and len(scaled) == 1:
        return [examples(scaled[0])]
    return [op.mixed("random numbers are drawn for the whole batch at once (as dropout does)")]


def random_wrap(op: Op) -> list[Value]:
    """Keys gain or lose a trailing dim."""
    return [op.ins[0] if not op.has_sum else op.mixed("a random key made of a batch sum")]


def passthrough(op: Op) -> list[Value]:
    """One output per operand, unchanged."""
    return list(op.ins)


# The rules that know what to do with an arange over the batch; elsewhere it is MIXED.
POSITION_RULES = frozenset(
    {elementwise, broadcast_in_dim, reshape, transpose, squeeze, concatenate}
)

RULES: dict[str, Rule] = {
    **BATCH_SHAPE_RULES,
    **dict.fromkeys(names.ELEMENTWISE, elementwise),
    **dict.fromkeys(names.REDUCE_NOT_SUM, reduce_other),
    **dict.fromkeys(names.ALONG_AXIS, along_axis),
    **dict.fromkeys(names.RANDOM_KEYS, random_wrap),
    **dict.fromkeys(names.PASSTHROUGH, passthrough),
    **dict.fromkeys(names.RANDOM, random_bits),
    "reduce_sum": reduce_sum,
}
