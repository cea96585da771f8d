"""The mesh on the machine: hosts, chips, which rows of the batch and which slices each holds."""

import itertools
import math
from collections.abc import Iterator, Mapping

from shardtrain.explore.choice import Choice

MOST_CHIPS = 256
CELL, GAP, TOP = 30, 10, 4
_HUES = (210, 30, 130, 290, 50, 350, 170, 250)


def mesh_svg(choice: Choice) -> str:
    """Every chip as a square: colour is its pipeline stage and tensor slice, number its batch part.

    Chips are numbered in mesh order, so that the innermost axes are on one host. A large machine
    is drawn up to `MOST_CHIPS`.

    Args:
        choice: the layout.
    """
    sizes = {name: size for name, size in choice.strategy.sizes.items() if size > 1}
    count = math.prod(sizes.values()) or 1
    per_host = choice.hardware.chip_count // choice.hardware.host_count or 1
    if choice.hardware.chip.kind != "gpu":
        per_host = min(8, choice.hardware.topology[-1]) or 1
    across = max(1, 16 // per_host) if per_host < 16 else 1
    columns = min(per_host, 16)
    rows_per_host = math.ceil(per_host / columns)
    shown = min(count, MOST_CHIPS)
    parts = []
    for chip, index in enumerate(itertools.islice(_places(sizes), shown)):
        host, inside = divmod(chip, per_host)
        x = (host % across) * (columns * CELL + GAP) + (inside % columns) * CELL
        y = (host // across) * (rows_per_host * CELL + GAP) + (inside // columns) * CELL + TOP
        parts.append(_chip(chip, x, y, index, sizes, choice))
    hosts = math.ceil(shown / per_host)
    width = min(hosts, across) * (columns * CELL + GAP)
    height = math.ceil(hosts / across) * (rows_per_host * CELL + GAP) + TOP
    label = f"{shown} of {count} chips" if shown < count else f"{count} chips"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        f'style="font-size:11px;max-width:{2 * width}px">{"".join(parts)}</svg>'
    )


def _places(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Index on every axis, chip by chip."""
    for index in itertools.product(*(range(size) for size in sizes.values())):
        yield dict(zip(sizes, index, strict=True))


def _chip(
    chip: int, x: float, y: float, index: Mapping[str, int], sizes: Mapping[str, int],
    choice: Choice,
) -> str:  # fmt: skip
    stage, slice_ = index.get("pipeline", 0), index.get("tensor", 0)
    batch = batch_part(index, sizes)
    hue = _HUES[stage % len(_HUES)] + 12 * (stage // len(_HUES))
    light = 72 - 28 * slice_ / max(1, sizes.get("tensor", 1) - 1)
    told = f"chip {chip}: " + ", ".join(f"{axis} {n}" for axis, n in index.items())
    told += f"\nrows: part {batch + 1} of {batch_parts(sizes)}"
    told += f"\nholds: {slices_text(index, sizes, choice.strategy.zero)}"
    mark = _mark(x, y, index, sizes) if choice.strategy.zero and "fsdp" in sizes else ""
    return (
        f'<g><rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="4" '
        f'fill="hsl({hue} 55% {light:.0f}%)"><title>{told}</title></rect>'
        f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 2}" text-anchor="middle" '
        f'style="fill:#10151c;pointer-events:none">{batch + 1}</text>{mark}</g>'
    )


def _mark(x: float, y: float, index: Mapping[str, int], sizes: Mapping[str, int]) -> str:
    """A short line where the chip's slice over fsdp lies within the whole."""
    shards = sizes["fsdp"]
    wide = max(2.0, (CELL - 6) / shards)
    left = x + 3 + (CELL - 6 - wide) * index["fsdp"] / (shards - 1)
    return (
        f'<rect x="{left:.1f}" y="{y + CELL - 6}" width="{wide:.1f}" height="3" '
        'style="fill:#10151c;pointer-events:none"/>'
    )


def batch_part(index: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Which part of the batch a chip reads."""
    part = 0
    for axis in ("data", "fsdp", "expert"):
        part = part * sizes.get(axis, 1) + index.get(axis, 0)
    return part


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Parts the batch is divided into."""
    return math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert"))


def slices_text(index: Mapping[str, int], sizes: Mapping[str, int], zero: int) -> str:
    """`stage 2 of 4, width 1/2, parameters and optimizer 3/8`: what a chip holds.

    Args:
        index: its index on every axis.
        sizes: mesh axis -> size.
        zero: what is sharded over fsdp.
    """
    parts = []
    if "pipeline" in sizes:
        parts.append(f"stage {index['pipeline'] + 1} of {sizes['pipeline']}")
    if "tensor" in sizes:
        parts.append(f"heads and mlp {index['tensor'] + 1}/{sizes['tensor']}")
    if "expert" in sizes:
        parts.append(f"experts {index['expert'] + 1}/{sizes['expert']}")
    if "context" in sizes:
        parts.append(f"sequence {index['context'] + 1}/{sizes['context']}")
    if "fsdp" in sizes and zero:
        what = {1: "optimizer state", 2: "gradients and optimizer state"}
        shard = f"{index['fsdp'] + 1}/{sizes['fsdp']}"
        parts.append(f"{what.get(zero, 'parameters, gradients, optimizer state')} {shard}")
    return ", ".join(parts) or "everything"
