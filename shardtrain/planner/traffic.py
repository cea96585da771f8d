"""Sums and tables over collectives: payload, bytes on the wire, per axis and per kind."""

from collections.abc import Iterable

from rich.table import Table

from shardtrain.planner.collectives import Collective


def wire_bytes(collective: Collective) -> float:
    """Bytes one device sends in one execution with ring algorithms, `n` devices in a group.

    all-reduce `2(n-1)/n` of the array; all-gather, reduce-scatter, all-to-all `(n-1)/n`; permute
    and broadcast 1. (Patarasuk and Yuan 2009; the convention of the ZeRO and Megatron papers.)

    Raises:
        ValueError: `group_size` is not known.

    Example:
        >>> wire_bytes(Collective("all-reduce", 1000, ("data",), group_size=4))
        1500.0
    """
    if collective.kind in ("collective-permute", "collective-broadcast"):
        return float(collective.bytes)
    n = collective.group_size
    if n < 1:
        raise ValueError(f"{collective.kind} over {collective.axes}: group_size is not known")
    return collective.bytes * (n - 1) / n * (2 if collective.kind == "all-reduce" else 1)


def select(
    collectives: Iterable[Collective], axis: str | None = None, kind: str | None = None
) -> list[Collective]:
    """Those that run over an axis (alone or with others) and are of a kind."""
    return [
        c
        for c in collectives
        if (axis is None or axis in c.axes) and (kind is None or kind == c.kind)
    ]


def total_bytes(
    collectives: Iterable[Collective], axis: str | None = None, kind: str | None = None
) -> int:
    """Payload of a step on one device: `bytes x count / every`, summed.

    Args:
        collectives: what `collectives_of` returned.
        axis: only those that run over this mesh axis, alone or with others.
        kind: only this kind.
    """
    return sum(c.bytes * c.count // c.every for c in select(collectives, axis, kind))


def total_wire_bytes(
    collectives: Iterable[Collective], axis: str | None = None, kind: str | None = None
) -> float:
    """Bytes one device sends in a step: `wire_bytes x count`, summed (see `total_bytes`)."""
    return sum(wire_bytes(c) * c.count / c.every for c in select(collectives, axis, kind))


def format_bytes(size: float) -> str:
    """Bytes in powers of 1000 with three digits, as communication is usually quoted.

    Example:
        >>> format_bytes(1536), format_bytes(12)
        ('1.54 kB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("the loop always returns")


def collectives_table(collectives: Iterable[Collective], title: str = "Communication") -> Table:
    """A rich table, largest traffic first, with the totals in the footer."""
    rows = sorted(collectives, key=lambda c: -c.bytes * c.count)
    exact = all(c.is_exact for c in rows)
    total = format_bytes(total_bytes(rows))
    table = Table(
        title=title, show_footer=bool(rows), caption=None if exact else "≈ depends on data"
    )
    table.add_column("kind", "total")
    table.add_column("axes")
    table.add_column("bytes", justify="right")
    table.add_column("per step", str(sum(c.count for c in rows)), justify="right")
    table.add_column("bytes per step", total, justify="right")
    table.add_column("async, behind")
    table.add_column("parameter", overflow="fold")
    table.add_column("source", overflow="fold")
    for c in rows:
        table.add_row(
            c.kind,
            axes_text(c),
            format_bytes(c.bytes),
            times_text(c),
            format_bytes(c.bytes * c.count / c.every),
            f"{c.overlapped_flops / 1e9:.3g} GFLOP" if c.is_async else "",
            shorten(c.parameter),
            "/".join(c.source.rsplit("/", 2)[-2:]),
        )
    return table


def times_text(collective: Collective) -> str:
    """`3`, `≈1` where it depends on data, `1 in 8` for one that runs every eighth step."""
    if collective.every > 1:
        return f"{collective.count} in {collective.every}"
    return f"{'' if collective.is_exact else '≈'}{collective.count}"


def shorten(names: str, limit: int = 3) -> str:
    """The first few of names joined with ` + `.

    Example:
        >>> shorten("a + b + c + d + e")
        'a + b + c + 2 more'
    """
    parts = names.split(" + ")
    return " + ".join(parts[:limit] + [f"{len(parts) - limit} more"] * (len(parts) > limit))


def axes_text(collective: Collective) -> str:
    """`data × fsdp`; `? (part of tensor)` where groups are not whole axes."""
    if collective.axes == ("?",):
        return f"? (part of {' × '.join(collective.within)})" if collective.within else "?"
    return " × ".join(collective.axes)
