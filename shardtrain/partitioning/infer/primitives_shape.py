"""Dim rules of elementwise, shape, reduction and ordering primitives."""

from collections.abc import Callable

from shardtrain.partitioning.infer import primitive_names as names
from shardtrain.partitioning.infer.dim_graph import Dims, Site

DimRule = Callable[[Site, list[Dims]], list[Dims]]


def elementwise(site: Site, ins: list[Dims]) -> list[Dims]:
    """Dims of equal size are the same dim; size-1 dims and scalars broadcast."""
    out: Dims = []
    for axis in range(len(site.out_shape())):
        known = [d[axis] for d in ins if len(d) == len(site.out_shape()) and d[axis]]
        out.append(known[0] if known else site.fresh(site.out_shape()[axis]))
        for other in known[1:]:
            site.unify(known[0], other)
    if site.eqn.primitive.name == "add" and out and all(site.in_data):
        site.graph.residual.append(out[-1])
    return [out] * len(site.eqn.outvars)


def broadcast_in_dim(site: Site, ins: list[Dims]) -> list[Dims]:
    """Operand dims keep their atoms; new and expanded dims are fresh."""
    where = {out: i for i, out in enumerate(site.params["broadcast_dimensions"])}
    out = []
    for axis, size in enumerate(site.out_shape()):
        kept = ins[0][where[axis]] if axis in where else []
        out.append(kept or site.fresh(size))
    return [out]


def reshape(site: Site, ins: list[Dims]) -> list[Dims]:
    """Merges and splits atoms; what does not factor is gathered."""
    out, lost = site.graph.atoms.divide(ins[0], site.out_shape(), site.eqn, site.outer)
    site.need_whole(lost, site.in_bytes(), "a reshape that does not follow the dim")
    return [out]


def transpose(site: Site, ins: list[Dims]) -> list[Dims]:
    """Reorders dims."""
    return [[ins[0][i] for i in site.params["permutation"]]]


def squeeze(site: Site, ins: list[Dims]) -> list[Dims]:
    """Drops dims of size 1."""
    return [[d for i, d in enumerate(ins[0]) if i not in site.params["dimensions"]]]


def expand_dims(site: Site, ins: list[Dims]) -> list[Dims]:
    """Inserts dims of size 1."""
    kept = iter(ins[0])
    new = site.params["dimensions"]
    return [[[] if i in new else next(kept) for i in range(len(site.out_shape()))]]


def _cut(site: Site, ins: list[Dims], axis: int, i: int, out: int = 0) -> list[int]:
    """A fresh dim linked to the dim it is cut from (or glued into) along `axis`."""
    part = site.fresh(site.out_shape(out)[axis])
    site.link(ins[i][axis], part, min(site.in_bytes(i), site.out_bytes(out)))
    return part


def slice_(site: Site, ins: list[Dims]) -> list[Dims]:
    """Whole dims pass; cut dims are linked."""
    same = zip(site.shape(0), site.out_shape(), strict=True)
    return [[ins[0][a] if m == n else _cut(site, ins, a, 0) for a, (m, n) in enumerate(same)]]


def pad(site: Site, ins: list[Dims]) -> list[Dims]:
    """Unpadded dims pass; padded dims are linked."""
    config = site.params["padding_config"]
    return [
        [
            d if tuple(config[a]) == (0, 0, 0) else _cut(site, ins, a, 0)
            for a, d in enumerate(ins[0])
        ]
    ]


def concatenate(site: Site, ins: list[Dims]) -> list[Dims]:
    """Other dims are the same; the glued dim is linked to its pieces."""
    axis, out = site.params["dimension"], list(ins[0])
    out[axis] = site.fresh(site.out_shape()[axis])
    for i, dims in enumerate(ins):
        site.link(out[axis], dims[axis], site.in_bytes(i))
        _unify_others(site, ins[0], dims, axis)
    return [out]


def _unify_others(site: Site, one: Dims, two: Dims, axis: int) -> None:
    for a, (x, y) in enumerate(zip(one, two, strict=True)):
        if a != axis:
            site.unify(x, y)


def split(site: Site, ins: list[Dims]) -> list[Dims]:
    """Pieces are linked to the whole."""
    axis = site.params["axis"]
    outs = []
    for i in range(len(site.eqn.outvars)):
        piece = list(ins[0])
        piece[axis] = _cut(site, ins, axis, 0, i)
        outs.append(piece)
    return outs


def stack(site: Site, ins: list[Dims]) -> list[Dims]:
    """A new dim in front of the others, which are the same."""
    for dims in ins[1:]:
        _unify_others(site, ins[0], dims, -1)
    out, axis = list(ins[0]), site.params["axis"]
    out.insert(axis, site.fresh(site.out_shape()[axis]))
    return [out]


def unstack(site: Site, ins: list[Dims]) -> list[Dims]:
    """The stacked dim disappears; it cannot stay sharded."""
    axis = site.params["axis"]
    site.need_whole(ins[0][axis], site.in_bytes(), "unstack")
    return [[d for a, d in enumerate(ins[0]) if a != axis]] * len(site.eqn.outvars)


def tile(site: Site, ins: list[Dims]) -> list[Dims]:
    """Repeats become a major factor of the dim."""
    reps = site.params["reps"]
    return [[[*site.fresh(r), *d] for r, d in zip(reps, ins[0], strict=True)]]


def fresh(site: Site, _: list[Dims]) -> list[Dims]:
    """Numbers made from nothing: iota, random bits."""
    return [[site.fresh(s) for s in v.aval.shape] for v in site.eqn.outvars]


def reduce_(site: Site, ins: list[Dims]) -> list[Dims]:
    """Removed dims leave partial results when sharded."""
    axes = site.params.get("axes", site.params.get("dimensions"))
    for axis in axes:
        site.reduces(ins[0][axis], linear=site.eqn.primitive.name == "reduce_sum")
    out = [d for a, d in enumerate(ins[0]) if a not in axes]
    return [out] * len(site.eqn.outvars)


def along_axis(site: Site, ins: list[Dims]) -> list[Dims]:
    """sort, cumulative ops, rev: elementwise but for one dim, which is gathered when sharded."""
    axes = site.params.get("dimensions", (site.params.get("dimension", site.params.get("axis")),))
    for dims in ins[1:]:
        _unify_others(site, ins[0], dims, -1)
    for axis in axes:
        site.need_whole(ins[0][axis], site.in_bytes(), f"`{site.eqn.primitive.name}` along the dim")
    return [ins[0]] * len(site.eqn.outvars)


def top_k(site: Site, ins: list[Dims]) -> list[Dims]:
    """The sorted dim is gathered; the k results are a new dim."""
    axis = site.params.get("axis", site.params.get("reduction_dimension", -1)) % len(ins[0])
    site.need_whole(ins[0][axis], site.in_bytes(), "top-k along the dim")
    site.graph.ranked.append(ins[0][axis])
    out = list(ins[0])
    out[axis] = site.fresh(site.out_shape()[axis])
    return [out, out]


def fft(site: Site, ins: list[Dims]) -> list[Dims]:
    """Transformed dims are whole and new."""
    count = len(site.params["fft_lengths"])
    out = list(ins[0])
    for axis in range(len(out) - count, len(out)):
        site.need_whole(out[axis], site.in_bytes(), "a Fourier transform along the dim")
        out[axis] = site.fresh(site.out_shape()[axis])
    return [out]


def keys(site: Site, ins: list[Dims]) -> list[Dims]:
    """Random keys: leading dims pass, a trailing one may come or go."""
    rank = len(site.out_shape())
    out = ins[0][:rank]
    return [[*out, *(site.fresh(s) for s in site.out_shape()[len(out) :])]]


def passthrough(_: Site, ins: list[Dims]) -> list[Dims]:
    """One result per operand, unchanged."""
    return list(ins)


SHAPE_RULES: dict[str, DimRule] = {
    **dict.fromkeys(names.ELEMENTWISE, elementwise),
    **dict.fromkeys(names.REDUCE_NOT_SUM, reduce_),
    **dict.fromkeys(names.ALONG_AXIS, along_axis),
    **dict.fromkeys(names.RANDOM, fresh),
    **dict.fromkeys(names.RANDOM_KEYS, keys),
    **dict.fromkeys(names.PASSTHROUGH, passthrough),
    "reduce_sum": reduce_,
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "expand_dims": expand_dims,
    "slice": slice_,
    "pad": pad,
    "concatenate": concatenate,
    "split": split,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "iota": fresh,
    "top_k": top_k,
    "approx_top_k": top_k,
    "fft": fft,
}
