"""How many bytes an exchange sends, by formula: what `plan.collectives()` must show."""

import math
from collections.abc import Sequence
from typing import Any

from shardtrain.algorithms import PowerSGD, TopK
from shardtrain.sync.codecs import make_codec
from shardtrain.sync.sums import as_matrix, kept

Shapes = Sequence[tuple[int, ...]]


def exchange_payloads(compression: Any, shapes: Shapes, count: int) -> list[tuple[str, int]]:
    """Collectives of one exchange, as `(kind, payload bytes)` on one device.

    With `n` numbers and `R` replicas (payload as in `Collective.bytes`):

    - float32: reduce-scatter and all-gather of `4 n`, padded to a multiple of R;
    - codes of b bits with blocks of B: all-to-all and all-gather of `n b / 8 + 4 n / B`, each
      array padded to a multiple of B, all of them to a multiple of `R B`;
    - top-k: all-gather of `8 R k`;
    - rank r: all-reduce of `4 (r rows + whole arrays)` and of `4 r columns`.

    Args:
      compression: `Int8()` and the like, or None.
      shapes: Of one device's shards.
      count: Replicas, R.

    Example:
      >>> from shardtrain.algorithms import Int8
      >>> exchange_payloads(None, [(1024, 1024)], 8)
      [('reduce-scatter', 4194304), ('all-gather', 4194304)]
      >>> exchange_payloads(Int8(), [(1024, 1024)], 8)
      [('all-to-all', 1064960), ('all-gather', 1064960)]
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    codec = make_codec(compression)
    if codec is not None:
        blocks = sum(n + -n % codec.block for n in sizes)
        sent = codec.row_bytes(blocks + -blocks % (count * codec.block))
        return [("all-to-all", sent), ("all-gather", sent)]
    if isinstance(compression, TopK):
        return [("all-gather", 8 * count * sum(kept(compression.fraction, n) for n in sizes))]
    if isinstance(compression, PowerSGD):
        rank = compression.rank
        matrices = [m for m in (as_matrix(s, rank) for s in shapes) if m is not None]
        whole = total - sum(rows * columns for rows, columns in matrices)
        left = 4 * (rank * sum(rows for rows, _ in matrices) + whole)
        right = 4 * rank * sum(columns for _, columns in matrices)
        return [("all-reduce", left)] + ([("all-reduce", right)] if right else [])
    padded = 4 * (total + -total % count)
    return [("reduce-scatter", padded), ("all-gather", padded)]
