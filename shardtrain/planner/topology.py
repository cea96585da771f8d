"""How long a collective takes on a chip's links: latency plus bytes over bandwidth.

Ring forms (Thakur et al. 2005; jax-ml/scaling-book 'Sharded matrices' and 'How to think about
GPUs'): an all-gather or reduce-scatter of V bytes over n chips moves V (n-1)/n past every chip,
an all-reduce twice that. A group wider than the fast domain is bound by what its hosts' network
cards carry together, so the cards of one host count as one wide pipe.
"""

from shardtrain.errors import HardwareError, suggest
from shardtrain.hardware import Chip

PASSES = {
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-reduce": 2.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
    "broadcast": 1.0,
}
"""How often the whole payload crosses a chip's link."""


def group_bandwidth(chip: Chip, size: int, domain: int, stride: int = 1) -> tuple[float, float]:
    """(bytes/s one way, seconds of latency) for a group of chips.

    Args:
        chip: what the group is made of.
        size: chips in the group.
        domain: chips joined by the fast links.
        stride: distance between neighbours of the group in chip numbering: the product of the
            axis sizes inside it. A group of stride 8 on hosts of 8 uses one card per host.
    """
    if size * stride <= domain:
        return chip.link_bandwidth, chip.link_latency
    inside = max(1, domain // max(stride, 1))
    wide = min(chip.link_bandwidth, inside * chip.network_bandwidth)
    return wide, chip.network_latency


def collective_seconds(
    kind: str, payload: float, size: int, chip: Chip, domain: int, stride: int = 1
) -> float:
    """Seconds of one collective, alone on the links.

    Args:
        kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or
            "collective-permute".
        payload: bytes of the whole (gathered) array on one chip; for an all-to-all and a
            permute the bytes each chip holds.
        size: chips in the group.
        chip: their kind.
        domain: chips joined by the fast links.
        stride: see `group_bandwidth`.

    Raises:
        HardwareError: the kind is unknown.

    Example:
        >>> from shardtrain.hardware import chip
        >>> round(1e3 * collective_seconds("all-gather", 1e9, 8, chip("h100"), 8), 2)
        1.96
    """
    if kind not in PASSES:
        raise HardwareError(f"collective {kind!r} is unknown; {suggest(kind, PASSES)}")
    if size <= 1 or payload <= 0:
        return 0.0
    bandwidth, latency = group_bandwidth(chip, size, domain, stride)
    moved = payload * PASSES[kind] * (1.0 if kind == "collective-permute" else (size - 1) / size)
    if kind == "all-to-all" and chip.torus and size * stride <= domain:
        moved /= 4  # a bidirectional ring halves the path and both directions carry half
    return moved / bandwidth + latency * steps(kind, size, chip)


def steps(kind: str, size: int, chip: Chip) -> float:
    """Latency steps of a collective: around a torus dim, or log-depth through switches."""
    if kind == "collective-permute":
        return 1.0
    if chip.torus:
        return max(1.0, size ** (1 / chip.torus) / 2 * chip.torus)
    return 1.0 + (size - 1).bit_length()
