"""A `Model` from the parameter shapes of any transformer-like module, so that it can be searched.

Only names and shapes are read: repeated blocks by the numbers in their paths (or a stacked leading
dim), the width by what norms have in common, the rest by which dims occur with it. What shapes
cannot tell (heads of a fused projection, experts per token) is guessed or given by the caller.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

from shardtrain.errors import ModelError
from shardtrain.planner.catalogue_model import Model

Shape = tuple[int, ...]


def describe_parameters(
    shapes: Mapping[str, Shape], name: str = "model", head_dim: int = 0, top_k: int = 2
) -> Model:
    """The shape of a transformer from its parameters.

    Args:
        shapes: parameter path (with `/` or `.` between parts) -> shape.
        name: what to call it.
        head_dim: width of a head; 0: from a (width, heads, head_dim) kernel, else 128 or 64.
        top_k: experts per token of a mixture.

    Raises:
        ModelError: there is no repeated block of matrices, so this is no transformer.

    Example:
        >>> block = {"attn/qkv": (64, 192), "attn/out": (64, 64), "mlp/up": (64, 256),
        ...          "mlp/down": (256, 64), "norm": (64,)}
        >>> shapes = {f"blocks/{i}/{k}": v for i in range(4) for k, v in block.items()}
        >>> found = describe_parameters(shapes | {"embed": (1000, 64)}, head_dim=16)
        >>> found.layers, found.d_model, found.d_ff, found.n_heads, found.vocab, found.tied
        (4, 64, 256, 4, 1000, True)
    """
    layers, block, outside = _blocks(shapes)
    width = _width(block)
    tables = [s for s in outside if len(s) == 2 and width in s and max(s) > width]
    vocab = max((max(s) for s in tables), default=0)
    heads_tables = [s for s in tables if vocab in s]
    kernels = [s for s in block if len(s) >= 2 and math.prod(s) >= width * width // 64]
    experts = _experts(kernels, width)
    dense = [s for s in kernels if not (experts and len(s) == 3 and s[0] == experts)]
    routed = [s for s in kernels if s not in dense]
    hidden = max((d for s in dense for d in s if len(s) == 2 and d > width), default=0)
    mlp = [s for s in dense if hidden in s and not _attention_like(s, width)]
    attention = sum(math.prod(s) for s in dense if s not in mlp)
    heads, kv, each = _heads(dense, width, attention, head_dim)
    expert_ff = max((max(s[1:]) for s in routed), default=0)
    total = sum(math.prod(s) for s in shapes.values())
    return Model(
        name, layers, width, heads, kv, each, hidden if mlp else 0, vocab,
        len(routed or mlp) or 2, len(heads_tables) == 1, experts=experts,
        top_k=min(top_k, experts), expert_ff=expert_ff, exact=total, source="parameter shapes",
        moe_layers=None if experts else 0,
    )  # fmt: skip


def _blocks(shapes: Mapping[str, Shape]) -> tuple[int, list[Shape], list[Shape]]:
    """(number of blocks, shapes in one block, shapes outside the blocks)."""
    groups: dict[str, list[Shape]] = {}
    for path, shape in shapes.items():
        key = "/".join(re.sub(r"\d+", "*", part) for part in re.split(r"[/.]", path))
        groups.setdefault(key, []).append(shape)
    counts = Counter(len(g) for g in groups.values() if len(g) > 1 and len(set(g)) == 1)
    if counts:
        layers = max(counts, key=lambda n: (counts[n] * n, n))
        block = [g[0] for g in groups.values() if len(g) == layers]
        outside = [s for g in groups.values() if len(g) != layers for s in g]
        return layers, block, outside
    leading = Counter(s[0] for s in shapes.values() if len(s) >= 2)
    stacked = [n for n, times in leading.most_common() if times >= 4]
    if not stacked:
        raise ModelError(
            f"no repeated block among {len(shapes)} parameters; describe it with planner.Model"
        )
    layers = stacked[0]
    inside = [s for s in shapes.values() if len(s) >= 2 and s[0] == layers]
    return layers, [s[1:] for s in inside], [s for s in shapes.values() if s not in inside]


def _width(block: list[Shape]) -> int:
    """The residual width: what most vectors have, or else most kernels."""
    vectors = Counter(s[0] for s in block if len(s) == 1)
    kernels = Counter(d for s in block if len(s) >= 2 for d in set(s))
    both = {d: vectors[d] + kernels[d] for d in kernels}
    if not both:
        raise ModelError("the repeated block has no matrices; describe it with planner.Model")
    return max(both, key=lambda d: (both[d], d))


def _experts(kernels: list[Shape], width: int) -> int:
    """Leading dim that at least two (experts, in, out) kernels share, else 0."""
    triples = Counter(s[0] for s in kernels if len(s) == 3 and width in s[1:] and s[0] != width)
    wide = [n for n, times in triples.items() if times >= 2 and n <= 1024]
    shared = [n for n in wide if all(max(s[1:]) >= width // 4 for s in kernels if s[0] == n)]
    return max(shared, default=0)


def _attention_like(shape: Shape, width: int) -> bool:
    """A fused query-key-value kernel: one side the width, the other three times it."""
    return len(shape) == 3 or sorted(shape) == [width, 3 * width]


def _heads(dense: list[Shape], width: int, weights: int, head_dim: int) -> tuple[int, int, int]:
    """(query heads, key-value heads, head width) from the attention weights of one block."""
    split = [s for s in dense if len(s) == 3 and s[0] == width]
    if split and not head_dim:
        head_dim = split[0][2]
    each = head_dim or (128 if width % 128 == 0 and width >= 2048 else 64)
    each = min(each, width)
    heads = max((s[1] for s in split), default=max(1, width // each))
    kv = round(weights / (2 * width * each)) - heads
    return heads, min(max(kv, 1), heads), each
