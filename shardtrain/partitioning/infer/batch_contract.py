"""Batch rules of contractions, gathers, scatters and windows for `batch_independence`."""

from shardtrain.partitioning.infer import primitive_names as names
from shardtrain.partitioning.infer.batch_value import SUM, Kind, Op, Rule, Value, examples


def dot_general(op: Op) -> list[Value]:
    """Two per-example operands may meet in a batch dim, or be contracted into a batch sum."""
    (contract, batch) = op.params["dimension_numbers"]
    lhs, rhs = op.ins
    if lhs.per_example and rhs.per_example:
        if (lhs.dim, rhs.dim) in zip(*contract, strict=True):
            return [SUM]
        if (lhs.dim, rhs.dim) in zip(*batch, strict=True):
            return [examples(batch[0].index(lhs.dim))]
        return [op.mixed("compares every example with every other (batch x batch product)")]
    if _has(op, Kind.SUM):
        return [_product_with_sum(op)]
    free = [
        [d for d in range(len(op.in_shape(i))) if d not in (*contract[i], *batch[i])]
        for i in (0, 1)
    ]
    if lhs.per_example and lhs.dim in free[0]:
        return [examples(len(batch[0]) + free[0].index(lhs.dim))]
    if rhs.per_example and rhs.dim in free[1]:
        return [examples(len(batch[0]) + len(free[0]) + free[1].index(rhs.dim))]
    return [op.mixed("contracts the batch with a value that does not depend on it")]


def _has(op: Op, kind: Kind) -> bool:
    return any(v.kind is kind for v in op.ins)


def _product_with_sum(op: Op) -> Value:
    one, two = op.ins
    if one.same or two.same:
        return SUM
    return op.mixed(f"`{op.name}` multiplies a sum over the batch by a batch-dependent value")


def conv_general_dilated(op: Op) -> list[Value]:
    """Forward: batch stays batch. Kernel gradient: the batch is contracted as the feature dim."""
    numbers = op.params["dimension_numbers"]
    lhs, rhs = op.ins
    if _has(op, Kind.SUM):
        return [_product_with_sum(op)]
    plain = op.params["batch_group_count"] == 1
    if plain and rhs.same and lhs.per_example and lhs.dim == numbers.lhs_spec[0]:
        return [examples(numbers.out_spec[0])]
    features = plain and op.params["feature_group_count"] == 1
    if features and lhs.per_example and rhs.per_example:
        contracted = (lhs.dim, rhs.dim) == (numbers.lhs_spec[1], numbers.rhs_spec[1])
        return [SUM if contracted else op.mixed("a convolution that pairs examples")]
    return [op.mixed("a convolution over the batch dim")]


def gather(op: Op) -> list[Value]:
    """Embedding look-ups by per-example indices, and look-ups inside each example."""
    n = op.params["dimension_numbers"]
    operand, indices = op.ins
    rank = len(op.out_avals[0][0].shape)
    batch_out = [d for d in range(rank) if d not in n.offset_dims]
    if operand.kind in (Kind.POSITION, Kind.COLUMNS):
        return [op.mixed("gathers from an arange over the batch")]
    if operand.kind is Kind.SUM:
        return [SUM if indices.same else op.mixed("looks up a sum over the batch per example")]
    if not operand.per_example:
        if indices.per_example and indices.dim < len(batch_out):
            return [examples(batch_out[indices.dim])]
        return [op.mixed("gathers by the position of each example in the batch")]
    if operand.dim in n.operand_batching_dims:
        paired = n.start_indices_batching_dims[n.operand_batching_dims.index(operand.dim)]
        if indices.per_example and indices.dim == paired:
            return [examples(batch_out[paired])]
    elif indices.same and _whole(op, operand.dim) and operand.dim not in n.collapsed_slice_dims:
        gone = (*n.collapsed_slice_dims, *n.operand_batching_dims)
        kept = [d for d in range(len(op.in_shape(0))) if d not in gone]
        return [examples(n.offset_dims[kept.index(operand.dim)])]
    elif _own_row(op, operand, indices):
        return [examples(batch_out[indices.dim])]
    return [op.mixed("gathers across the batch")]


def _whole(op: Op, dim: int) -> bool:
    return (
        op.params["slice_sizes"][dim] == op.in_avals[0][0].shape[dim]
        and op.params2["slice_sizes"][dim] == op.in_avals[0][1].shape[dim]
    )


def _own_row(op: Op, operand: Value, indices: Value) -> bool:
    """`x[jnp.arange(batch), labels]`: every example reads its own row."""
    columns = indices.columns
    if indices.kind is Kind.POSITION and op.in_shape(1)[-1] == 1:
        columns = frozenset({0})
    index_map = op.params["dimension_numbers"].start_index_map
    own = {index_map[c] for c in columns} == {operand.dim}
    return own and op.in_shape(0)[operand.dim] == op.sizes[0]


def scatter(op: Op) -> list[Value]:
    """Additive scatters into zeros sum over the batch; others act inside each example."""
    n = op.params["dimension_numbers"]
    operand, indices, updates = op.ins
    rank = len(op.in_shape(2))
    scattered = [d for d in range(rank) if d not in n.update_window_dims]
    if operand.per_example and updates.per_example:
        if operand.dim in n.operand_batching_dims:
            paired = n.scatter_indices_batching_dims[n.operand_batching_dims.index(operand.dim)]
            own = indices.per_example and indices.dim == paired
            if own and updates.dim == scattered[paired]:
                return [operand]
        elif indices.same and updates.dim in n.update_window_dims:
            gone = (*n.inserted_window_dims, *n.operand_batching_dims)
            kept = [d for d in range(len(op.in_shape(0))) if d not in gone]
            whole = op.in_shape(2)[updates.dim] == op.in_shape(0)[operand.dim]
            if whole and kept[n.update_window_dims.index(updates.dim)] == operand.dim:
                return [operand]
    elif operand.additive and op.name in ("scatter-add", "scatter_add"):
        if indices.same and updates.additive:
            return [SUM]
        paired = updates.per_example and updates.dim in scattered
        if paired and indices.per_example and scattered.index(updates.dim) == indices.dim:
            return [SUM]
    return [op.mixed(f"`{op.name}` writes across the batch")]


def dynamic_slice(op: Op) -> list[Value]:
    """Keeps the whole batch; the start of a full-size slice is clamped to 0."""
    operand, starts = op.ins[0], op.ins[1:]
    if all(v.same for v in starts):
        if operand.kind is Kind.SUM:
            return [SUM]
        if operand.per_example and _whole(op, operand.dim):
            return [operand]
    return [op.mixed("takes some of the examples of the batch (a dynamic slice)")]


def dynamic_update_slice(op: Op) -> list[Value]:
    """Writes rows of the same examples."""
    operand, update, *starts = op.ins
    if all(v.same for v in starts):
        if operand.additive and update.additive:
            return [SUM]
        rows = operand.per_example and update.per_example and operand.dim == update.dim
        if rows and op.in_shape(0)[operand.dim] == op.in_shape(1)[operand.dim]:
            return [operand]
    return [op.mixed("updates part of the batch (a dynamic update slice)")]


def window(op: Op) -> list[Value]:
    """Pooling: windows may not span examples."""
    dims = {v.dim for v in op.ins if v.per_example}
    if _has(op, Kind.SUM) and not dims:
        linear = op.name == "reduce_window_sum"
        return [SUM if linear else op.mixed(f"`{op.name}` of a sum over the batch")]
    if len(dims) == 1 and not _has(op, Kind.SUM):
        (dim,) = dims
        keys = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
        ones = all(op.params[k][dim] == 1 for k in keys if op.params.get(k) is not None)
        if ones and tuple(op.params["padding"][dim]) == (0, 0):
            return [examples(dim)]
    return [op.mixed(f"`{op.name}` has a window over the batch")]


def batched_linear_algebra(op: Op) -> list[Value]:
    """Matrices in the last two dims, one per example in front."""
    dims = {(v.dim, len(op.in_shape(i))) for i, v in enumerate(op.ins) if v.per_example}
    leading = all(dim < rank - 2 for dim, rank in dims)
    alike = len({dim for dim, _ in dims}) == 1
    if leading and alike and all(v.per_example for v in op.ins):
        return [examples(op.ins[0].dim)] * len(op.out_avals)
    return [op.mixed(f"`{op.name}` over the batch dim")] * len(op.out_avals)


CONTRACT_RULES: dict[str, Rule] = {
    **dict.fromkeys(names.SCATTER, scatter),
    **dict.fromkeys(names.WINDOW, window),
    **dict.fromkeys(names.BATCHED_MATRIX, batched_linear_algebra),
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
}
