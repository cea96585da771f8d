"""Does this checkpoint fit this plan? All differences at once, before anything is loaded."""

from collections.abc import Mapping

from shardtrain.checkpoint.leaves import LeafInfo
from shardtrain.errors import RestoreMismatch, suggest

_SHOWN = 40


def differences(saved: Mapping[str, LeafInfo], wanted: Mapping[str, LeafInfo]) -> list[str]:
    """One line per leaf that is missing, surplus, or of another shape, dtype or key kind."""
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            near = f" ({suggest(name, saved.keys() - wanted.keys())})" if saved else ""
            lines.append(f"{name}: {wanted[name]} in the plan, not in the checkpoint{near}")
        elif name not in wanted:
            lines.append(f"{name}: {saved[name]} in the checkpoint, not in the plan")
        elif difference := _difference(saved[name], wanted[name]):
            lines.append(f"{name}: {difference}")
    return lines


def _difference(saved: LeafInfo, wanted: LeafInfo) -> str | None:
    if saved.is_key != wanted.is_key or (saved.is_key and saved.dtype != wanted.dtype):
        return f"{saved} in the checkpoint, {wanted} in the plan (another kind of random key)"
    if saved.shape != wanted.shape:
        return f"shape {list(saved.shape)} in the checkpoint, {list(wanted.shape)} in the plan"
    if saved.dtype != wanted.dtype:
        return f"dtype {saved.dtype} in the checkpoint, {wanted.dtype} in the plan (never cast)"
    return None


def require_same(
    saved: Mapping[str, LeafInfo], wanted: Mapping[str, LeafInfo], where: str, models: str = ""
) -> None:
    """Raise one `RestoreMismatch` with every difference.

    Args:
        saved: leaves of the checkpoint.
        wanted: leaves of the plan.
        where: the step directory, for the message.
        models: what each side is a model of, when known.
    """
    lines = differences(saved, wanted)
    if not lines:
        return
    shown = "\n  ".join(lines[:_SHOWN])
    more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise RestoreMismatch(
        f"{where} was saved by another model or optimizer{models}: {len(lines)} of "
        f"{len(saved.keys() | wanted.keys())} leaves differ.\n  {shown}{more}\n"
        "Nothing was loaded or overwritten. Use the model it was saved with, or another directory."
    )
