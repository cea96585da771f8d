"""Which GPUs there are, and which of them one process drives. Starts no device."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardtrain.errors import DistributedError


def gpu_share(
    gpus: Sequence[str], process_index: int, process_count: int, each: int | None
) -> Sequence[str]:
    """The GPUs of one process: `each` of them, or an equal share of all.

    Example:
      >>> gpu_share(["0", "1", "2", "3"], process_index=1, process_count=2, each=None)
      ['2', '3']
    """
    if each is None and len(gpus) % process_count == 0:
        each = len(gpus) // process_count
    if each is None or each * process_count > len(gpus):
        asked = f"{each} GPUs each" if each else "an equal share"
        divisors = [n for n in range(1, len(gpus) + 1) if len(gpus) % n == 0]
        raise DistributedError(
            f"{process_count} processes cannot have {asked} of the {len(gpus)} visible GPUs. "
            f"Possible process counts: {divisors}; or JAX_PLATFORMS=cpu for a simulation."
        )
    return gpus[process_index * each : (process_index + 1) * each]


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """NVIDIA GPUs workers may use; empty if JAX was told to use something else."""
    if not environ.get("JAX_PLATFORMS", "cuda").startswith(("cuda", "gpu")):
        return ()
    if "CUDA_VISIBLE_DEVICES" in environ:
        return tuple(p for p in environ["CUDA_VISIBLE_DEVICES"].split(",") if p.strip())
    return tuple(str(i) for i in range(count_nvidia_devices()))


def count_nvidia_devices() -> int:
    """GPUs of this host, from the driver's device files (starts nothing)."""
    return sum(re.fullmatch(r"nvidia\d+", p.name) is not None for p in Path("/dev").glob("nvidia*"))


def select_gpus(
    visible: int | None,
    on_node: int | None,
    local_index: int,
    local_count: int,
    title: str,
    lines: tuple[str, str],
) -> tuple[int, ...] | None:
    """Which of the visible GPUs a process started by a scheduler drives; None for all of them.

    Args:
      visible: GPUs this process sees, None where there are none or nobody knows.
      on_node: GPUs of the allocation on this node, None where unknown.
      local_index, local_count: this process among those of its node.
      title, lines: scheduler and its two usual launch lines (`{gpus}` is filled in), for the error.

    Raises:
      DistributedError: the counts cannot be divided evenly.

    Example:
      >>> select_gpus(8, 8, local_index=1, local_count=2, title="SLURM", lines=("", ""))
      (4, 5, 6, 7)
    """
    if not visible:
        return None
    own = on_node is not None and visible * local_count == on_node
    if own or (local_count == 1 and on_node in (None, visible)):
        return None
    if visible % local_count == 0 and on_node in (None, visible):
        each = visible // local_count
        return tuple(range(local_index * each, (local_index + 1) * each))
    gpus = on_node or visible
    allocated = f", {on_node} allocated on this node" if on_node else ""
    raise DistributedError(
        f"{title}: {local_count} processes on this node, each sees {visible} GPUs{allocated}: "
        "these cannot be divided evenly. Start either one process per node, which drives all its "
        f"GPUs:\n  {lines[0].format(gpus=gpus)}\nor one process per GPU:\n  "
        f"{lines[1].format(gpus=gpus)}"
    )
