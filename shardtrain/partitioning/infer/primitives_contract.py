"""Dim rules of contractions, windows, look-ups and batched linear algebra."""

import math

from shardtrain.partitioning.infer import primitive_names as names
from shardtrain.partitioning.infer.atoms import Dim
from shardtrain.partitioning.infer.dim_graph import Contraction, Dims, Site
from shardtrain.partitioning.infer.primitives_shape import DimRule


def _flat(dims: list[Dim]) -> tuple[int, ...]:
    return tuple(a for dim in dims for a in dim)


def dot_general(site: Site, ins: list[Dims]) -> list[Dims]:
    """Contracted and batch dims are pairwise the same; free dims go to the result."""
    contract, batch = site.params["dimension_numbers"]
    lhs, rhs = ins
    for i, j in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        site.unify(lhs[i], rhs[j])
    free = [
        [d for a, d in enumerate(dims) if a not in (*contract[k], *batch[k])]
        for k, dims in enumerate(ins)
    ]
    width = math.prod(site.shape(0)[i] for i in contract[0])
    contracted = [lhs[i] for i in contract[0]]
    shared = [lhs[i] for i in batch[0]]
    other = [rhs[j] for j in contract[1]]
    _record(site, contracted, shared, free[0], free[1], width, other)
    return [[*shared, *free[0], *free[1]]]


def _record(
    site: Site,
    contracted: list[Dim],
    batch: list[Dim],
    lhs_free: list[Dim],
    rhs_free: list[Dim],
    width: int,
    rhs_contracted: list[Dim],
    kind: str = "dot",
) -> None:
    site.graph.contractions.append(
        Contraction(
            flops=2.0 * math.prod(site.out_shape()) * width * site.times,
            contracted=_flat(contracted),
            batch=_flat(batch),
            lhs_free=_flat(lhs_free),
            rhs_free=_flat(rhs_free),
            lhs_data=site.in_data[0],
            rhs_data=site.in_data[1],
            out_bytes=site.out_bytes(),
            rhs_contracted=_flat(rhs_contracted),
            kind=kind,
        )
    )
    site.reduces(_flat(contracted))


def ragged_dot_general(site: Site, ins: list[Dims]) -> list[Dims]:
    """Groups of rows times one matrix per group; rows and groups stay whole."""
    numbers = site.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    lhs, rhs, *_ = ins
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    for i, j in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        site.unify(lhs[i], rhs[j])
    for i in ragged:
        site.block(lhs[i], "rows of a ragged dot")
    for j in groups:
        site.block(rhs[j], "groups of a ragged dot")
        site.graph.grouped.append(rhs[j])
    left = [d for a, d in enumerate(lhs) if a not in (*contract[0], *batch[0])]
    right = [d for a, d in enumerate(rhs) if a not in (*contract[1], *batch[1], *groups)]
    shared = [lhs[i] for i in batch[0]]
    width = math.prod(site.shape(0)[i] for i in contract[0])
    contracted = [lhs[i] for i in contract[0]]
    out = [*shared, *left, *right]
    if len(out) < len(site.out_shape()):  # the ragged dim is contracted: one result per group
        group = site.fresh(site.out_shape()[0])
        site.block(group, "groups of a ragged dot")
        site.graph.grouped.append(group)
        out = [group, *out]
        width = max(1, width // max(1, site.out_shape()[0]))
    other = [rhs[j] for j in contract[1]]
    _record(site, contracted, shared, left, right, width, other, "ragged")
    return [out]


def conv_general_dilated(site: Site, ins: list[Dims]) -> list[Dims]:
    """Channels contract like a dot; windows and groups stay whole."""
    numbers, (lhs, rhs) = site.params["dimension_numbers"], ins
    left, right, o = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    out: Dims = [[] for _ in o]
    window = math.prod(site.shape(1)[a] for a in right[2:])
    for a, b, c in zip(left[2:], right[2:], o[2:], strict=True):
        out[c] = lhs[a] if window == 1 and site.shape(0)[a] == site.out_shape()[c] else []
        out[c] = out[c] or site.fresh(site.out_shape()[c])
        for dim in (lhs[a], rhs[b], out[c]):
            site.block(dim, "a spatial dim of a convolution")
    site.graph.spatial.append([out[c] for c in o[2:]])
    site.graph.spatial.append([rhs[b] for b in right[2:]])
    out[o[0]], out[o[1]] = lhs[left[0]], rhs[right[0]]
    groups = site.params["feature_group_count"], site.params["batch_group_count"]
    if groups != (1, 1):
        if groups[1] != 1:
            out[o[0]] = site.fresh(site.out_shape()[o[0]])
            site.block(lhs[left[0]], "a batch-grouped convolution")
        for dim in (
            lhs[left[1]],
            rhs[right[0]],
            rhs[right[1]],
            out[o[0]] if groups[1] != 1 else [],
        ):
            site.block(dim, "channels of a grouped convolution")
    else:
        site.unify(lhs[left[1]], rhs[right[1]])
    width = math.prod(site.shape(1)) // max(1, site.shape(1)[right[0]])
    kind = "conv" if right[2:] else "dot"
    inner = [rhs[right[1]]]
    _record(site, inner, [], [lhs[left[0]]], [rhs[right[0]]], width, inner, kind)
    return [out]


def window_op(site: Site, ins: list[Dims]) -> list[Dims]:
    """Pooling: dims with a window of one pass, the others stay whole."""
    sizes = site.params["window_dimensions"]
    out = []
    for axis, size in enumerate(sizes):
        dim = ins[0][axis]
        for other in ins[1:]:
            if size == 1 and len(other) == len(sizes):
                site.unify(dim, other[axis])
        if size != 1:
            for other in (d for d in ins if len(d) == len(sizes)):
                site.block(other[axis], "a pooling window")
            dim = site.fresh(site.out_shape()[axis])
            site.block(dim, "a pooling window")
        out.append(dim)
    return [out]


def _kept(rank: int, *gone: tuple[int, ...]) -> list[int]:
    return [a for a in range(rank) if not any(a in g for g in gone)]


def gather(site: Site, ins: list[Dims]) -> list[Dims]:
    """Looked-up dims leave partial results; sliced dims pass when whole."""
    n, (operand, indices) = site.params["dimension_numbers"], ins
    rank = len(site.out_shape())
    rows = [a for a in range(rank) if a not in n.offset_dims]
    out: Dims = [[] for _ in range(rank)]
    for a, dim in zip(rows, indices[:-1], strict=True):
        out[a] = dim
    for a, i in zip(n.operand_batching_dims, n.start_indices_batching_dims, strict=True):
        site.unify(operand[a], indices[i])
        out[rows[i]] = out[rows[i]] or operand[a]
    sliced = _kept(len(operand), n.collapsed_slice_dims, n.operand_batching_dims)
    for a, o in zip(sliced, n.offset_dims, strict=True):
        if site.params["slice_sizes"][a] == site.shape(0)[a]:
            out[o] = operand[a]
        else:
            out[o] = site.fresh(site.out_shape()[o])
            site.need_whole(operand[a], site.in_bytes(), "a gather of parts of the dim")
    for a in n.collapsed_slice_dims:
        if operand[a]:
            site.graph.indexed.append((operand[a], site.in_data[0], site.in_data[1]))
            site.reduces(operand[a])
    return [[d or site.fresh(s) for d, s in zip(out, site.out_shape(), strict=True)]]


def scatter(site: Site, ins: list[Dims]) -> list[Dims]:
    """The result is the operand; updates share its window dims and the indices' other dims."""
    n, (operand, indices, updates) = site.params["dimension_numbers"], ins
    rows = _kept(len(updates), n.update_window_dims)
    for a, dim in zip(rows, indices[:-1], strict=True):
        site.unify(updates[a], dim)
    for a, i in zip(n.operand_batching_dims, n.scatter_indices_batching_dims, strict=True):
        site.unify(operand[a], indices[i])
        site.unify(operand[a], updates[rows[i]])
    windows = _kept(len(operand), n.inserted_window_dims, n.operand_batching_dims)
    for a, u in zip(windows, n.update_window_dims, strict=True):
        if site.shape(0)[a] == site.shape(2)[u]:
            site.unify(operand[a], updates[u])
        else:
            site.need_whole(operand[a], site.in_bytes(), "a scatter into parts of the dim")
    batching = {rows[i] for i in n.scatter_indices_batching_dims}
    for a in rows:
        if a not in batching:
            site.reduces(updates[a])
    return [operand]


def dynamic_slice(site: Site, ins: list[Dims]) -> list[Dims]:
    """Whole dims pass; dims that are cut at a computed place are gathered."""
    out = []
    for a, (m, n) in enumerate(zip(site.shape(0), site.out_shape(), strict=True)):
        if m != n:
            site.need_whole(ins[0][a], site.in_bytes(), "a dynamic slice of the dim")
        out.append(ins[0][a] if m == n else site.fresh(n))
    return [out]


def dynamic_update_slice(site: Site, ins: list[Dims]) -> list[Dims]:
    """The result is the operand."""
    operand, update = ins[:2]
    for a, (m, n) in enumerate(zip(site.shape(0), site.shape(1), strict=True)):
        if m == n:
            site.unify(operand[a], update[a])
        else:
            site.need_whole(operand[a], site.in_bytes(), "a dynamic update of the dim")
    return [operand]


def batched_matrix(site: Site, ins: list[Dims]) -> list[Dims]:
    """Linear algebra on the last two dims, which stay whole; leading dims are the same."""
    lead = len(ins[0]) - 2
    for i, dims in enumerate(ins):
        for a, dim in enumerate(dims):
            if a < lead:
                site.unify(ins[0][a], dim)
            else:
                site.need_whole(dim, site.in_bytes(i), f"`{site.eqn.primitive.name}`")
    return [
        [*ins[0][:lead], *(site.fresh(s) for s in v.aval.shape[lead:])] for v in site.eqn.outvars
    ]


CONTRACT_RULES: dict[str, DimRule] = {
    **dict.fromkeys(names.SCATTER, scatter),
    **dict.fromkeys(names.WINDOW, window_op),
    **dict.fromkeys(names.BATCHED_MATRIX, batched_matrix),
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
}
