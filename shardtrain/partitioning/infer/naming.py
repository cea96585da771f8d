"""Readable names for classes of dims, from what the program does with them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from shardtrain.partitioning.infer.dim_graph import Contraction, DimGraph, Dims

# Names that stay when a dim is cut: a part of a sequence is a sequence.
_WHOLE = ("sequence", "batch", "embed", "head_dim", "vocab", "height", "width")
_SPATIAL = ("depth", "height", "width")
Leaf = tuple[str, Any, Dims]  # path, abstract array, dims


class Namer:
    """Gives every class at most one name; the first reason found wins."""

    def __init__(self, graph: DimGraph, params: Sequence[Leaf], inputs: Sequence[Leaf]) -> None:
        self.graph, self.params, self.inputs = graph, params, inputs
        self.names: dict[int, str] = {}
        self.roots = graph.atoms.roots
        self.in_params = Counter(r for _, _, dims in params for d in dims for r in self.roots(d))
        self.linked = self._linked_to_params()

    def run(self) -> dict[int, str]:
        """Class → name, for all classes of parameters and inputs."""
        # Token ids first: a mask over the same sequence is floating-point.
        for _, array, dims in sorted(self.inputs, key=lambda leaf: not _is_whole(leaf[1])):
            self._input(array, dims)
        for dims in self.graph.spatial:
            names = {1: ("sequence",), 2: ("height", "width")}.get(len(dims), _SPATIAL)
            for dim, name in zip(dims, names, strict=False):
                self._name(self.roots(dim), name)
        for dim in self.graph.scanned:
            self._name((r for r in self.roots(dim) if self.in_params[r]), "layers")
        self._looked_up_tables()
        for c in self.graph.contractions:
            self._attention(c)
        self._grouped_queries()
        self._embed()
        self._experts()
        self._hidden()
        self._outputs()
        self._convolutions()
        self._fused()
        self._distinct()
        return self.names

    def _linked_to_params(self) -> set[int]:
        """Classes of parameters, and those cut from or glued of them."""
        ends = [(self.roots(x.whole)[0], self.roots(x.part)[0]) for x in self.graph.links]
        found, before = {r for r in self.in_params if r >= 0}, -1
        while len(found) != before:
            before = len(found)
            found |= {x for a, b in ends for x in (a, b) if a in found or b in found}
        return found

    def _name(self, roots: Iterable[int], name: str) -> None:
        for r in roots:
            self.names.setdefault(r, name)

    def _input(self, array: Any, dims: Dims) -> None:
        if not dims:
            return
        middle = {3: ("sequence",), 4: ("height", "width"), 5: ("frames", "height", "width")}
        names = ["batch", *middle.get(len(dims), ()), "channels" if len(dims) > 3 else "features"]
        if _is_whole(array):
            names = ["batch", "sequence", "sequence", "sequence"]
        for dim, name in zip(dims, names, strict=False):
            self._name(self.roots(dim)[:1], name)

    def _looked_up_tables(self) -> None:
        for dim, of_data, by_data in self.graph.indexed:
            found = [r for r in self.roots(dim) if self.in_params[r]]
            if not of_data:
                self._name(found, "vocab" if by_data else "position")

    def _attention(self, c: Contraction) -> None:
        """Query-key and weight-value products: both operands are data, the batch is shared."""
        shared = self.roots(c.batch)
        batched = "batch" not in self.names.values() or any(self._is(r, "batch") for r in shared)
        if not (c.lhs_data and c.rhs_data and batched):
            return
        contracted = self.roots(c.contracted)
        free = self.roots(c.lhs_free), self.roots(c.rhs_free)
        self._name((r for r in shared if self.in_params[r]), "heads")
        self._name(set(free[0]) & set(free[1]), "sequence")  # every query with every key
        of_heads = any(self._is(r, "heads") for r in shared)
        scores = all(any(self._is(r, "sequence") for r in f) for f in free)
        if scores:  # what only the queries have: their heads, or heads per key head
            queries = [r for f in free for r in f if self.in_params[r]]
            self._name(queries, "q_per_kv" if of_heads else "heads")
            of_heads = of_heads or bool(queries)
        for r in (*contracted, *free[0], *free[1]) if of_heads else ():
            self._name([r], "head_dim" if r in self.linked else "sequence")

    def _is(self, root: int, name: str) -> bool:
        return self.names.get(root) == name

    def _pairs(self) -> Iterable[tuple[int, int]]:
        """Neighbouring atoms inside one dim of a parameter."""
        for _, _, dims in self.params:
            for dim in dims:
                roots = self.roots(dim)
                yield from pairwise(roots)

    def _grouped_queries(self) -> None:
        """Query heads that are two factors: key heads, and queries per key head."""
        for major, minor in self._pairs():
            if self._is(major, "heads") and self.names.get(minor) in ("heads", "q_per_kv"):
                self.names[major], self.names[minor] = "kv_heads", "q_per_kv"

    def _experts(self) -> None:
        for dim in self.graph.grouped:
            self._name(self.roots(dim), "expert")
        leading, last, first = set(), set(), set()
        for _, array, dims in self.params:
            where = [self.roots(d) for d in dims]
            if where and self._is((where[0] or (-1,))[0], "layers"):
                where = where[1:]
            if len(where) == 3 and array.ndim >= 3:
                leading.update(where[0][:1])
            if len(where) == 2:
                first.update(where[0][:1])
                last.update(where[1][:1])
        self._name((leading & last) - first, "expert")  # produced by a router, leads its matrices
        for c in self.graph.contractions:
            if c.lhs_data != c.rhs_data:
                self._name((r for r in self.roots(c.batch) if self.in_params[r]), "expert")
        sizes = {self.graph.atoms.size[r] for r, n in self.names.items() if n == "expert"}
        for dim in self.graph.ranked:
            for r in self.roots(dim):
                if self.in_params[r] and self.graph.atoms.size[r] in sizes:
                    self._name([r], "router")

    def _embed(self) -> None:
        """The residual stream: the class most parameters touch, and the rows of the vocabulary."""
        for _, _, dims in self.params:
            where = [self.roots(d) for d in dims]
            if len(where) == 2 and where[0] and self._is(where[0][0], "vocab"):
                self._name(where[1], "embed")
        added = {r for dim in self.graph.residual for r in self.roots(dim)[:1]}
        taken, made = self._weights()
        found = [(taken[r] + made[r], r) for r in added if taken[r] + made[r] > 3]
        found = [(n, r) for n, r in found if r not in self.names]
        if found and "embed" not in self.names.values():
            self._name([max(found)[1]], "embed")

    def _weights(self) -> tuple[Counter, Counter]:
        """How many weights contract with each class, and how many produce it, going forward."""
        taken, made = Counter(), Counter()
        seen: set[int] = set()
        for c in self.graph.contractions:
            if c.weight and c.kind != "conv" and not seen & {*c.weight[0], *c.weight[1]}:
                # The backward pass uses each weight the other way round, later.
                seen.update(c.weight[0], c.weight[1])
                taken.update(self.roots(c.weight[0]))
                made.update(self.roots(c.weight[1]))
        return taken, made

    def _hidden(self) -> None:
        """Produced by one weight (perhaps as part of a fused one), contracted with another."""
        taken, made = self._weights()
        ends = [(self.roots(x.whole)[0], self.roots(x.part)[0]) for x in self.graph.links]
        cut = {part for whole, part in ends if made[whole] and self.names.get(whole) is None}
        self._name((r for r in {*made, *cut} if taken[r] and self.in_params[r]), "mlp")

    def _outputs(self) -> None:
        vocab = {self.graph.atoms.size[r] for r, n in self.names.items() if n == "vocab"}
        for dim, of_data, _ in self.graph.indexed:
            for r in self.roots(dim):
                if of_data and self.in_params[r] and self.names.get(r) in (None, "mlp"):
                    same = self.graph.atoms.size[r] in vocab
                    self.names[r] = "vocab" if same else "classes"

    def _convolutions(self) -> None:
        taken = {r for c in self.graph.contractions for r in self.roots(c.contracted)}
        for c in self.graph.contractions:
            if c.kind == "conv" and c.lhs_data != c.rhs_data:
                free = self.roots(c.rhs_free)
                self._name((r for r in free if r in taken and self.in_params[r]), "channels")
                self._name((r for r in free if self.in_params[r]), "conv_out")
                self._name((r for r in self.roots(c.contracted) if self.in_params[r]), "conv_in")

    def _fused(self) -> None:
        """A dim that is cut into (or glued from) named dims, through any number of cuts."""
        before = -1
        while before != len(self.names):
            before = len(self.names)
            ends: dict[int, list[str]] = {}
            for link in self.graph.links:
                whole, part = self.roots(link.whole)[0], self.roots(link.part)[0]
                for here, there in ((whole, part), (part, whole)):
                    if there in self.names and here not in self.names:
                        ends.setdefault(here, []).append(self.names[there])
            for root, names in ends.items():
                common, _ = Counter(names).most_common(1)[0]
                plain = common.startswith("fused") or common in _WHOLE
                self.names[root] = common if plain else f"fused_{common}"

    def _distinct(self) -> None:
        """Two classes of one array never share a name; nameless ones are numbered."""
        number = 0
        for _, _, dims in (*self.params, *self.inputs):
            for r in (r for d in dims for r in self.roots(d)):
                if r not in self.names:
                    self.names[r] = f"axis{number}"
                    number += 1
        met: dict[int, set[int]] = {}
        for _, _, dims in self.params:
            roots = {r for d in dims for r in self.roots(d)}
            for r in roots:
                met.setdefault(r, set()).update(roots - {r})
        for r in sorted(met):
            base, count = self.names[r], 1
            while self.names[r] in {self.names[o] for o in met[r] if o < r}:
                count += 1
                self.names[r] = f"{base}_{count}"


def _is_whole(array: Any) -> bool:
    """Integers and booleans: ids, labels, lengths, masks."""
    return getattr(array.dtype, "kind", "V") in "iub"
