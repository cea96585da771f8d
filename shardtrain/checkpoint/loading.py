"""Reading one step onto a plan's shardings, believing nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from shardtrain.checkpoint import agreement, leaves, manifest, store
from shardtrain.checkpoint.compare import require_same
from shardtrain.checkpoint.fingerprint import as_text, fingerprint
from shardtrain.checkpoint.header import Header
from shardtrain.errors import CheckpointError


def damage(path: Path) -> list[str]:
    """What any process finds wrong with the files of a step; each checks a share of them."""
    found = manifest.problems(path, jax.process_index(), jax.process_count())
    return _agreed(found, "another process found it damaged")


def load_verified(path: Path, abstract: Any) -> tuple[Any, list[str]]:
    """The tree of a step whose files were verified, or what is wrong with its values.

    Args:
        path: the step directory.
        abstract: pytree of `jax.ShapeDtypeStruct` with shardings, as in the checkpoint.

    Raises:
        CheckpointError: it could not be loaded for another reason than damage.
    """
    header = manifest.read_header(path)
    wanted = leaves.named_leaves(abstract)
    restored, damaged = _load(path, wanted, header)
    changed = damaged or _changed(restored, wanted, header)
    if found := _agreed(changed, "another process read other values"):
        return None, found
    return jax.tree.unflatten(jax.tree.structure(abstract), restored), []


def require_fit(path: Path, infos: Mapping[str, leaves.LeafInfo], plan: Mapping[str, Any]) -> None:
    """Raise `RestoreMismatch` unless the step holds exactly the leaves of the plan."""
    header = manifest.read_header(path)
    models = f" (saved: {header.plan}; plan: {plan})" if header.plan != plan else ""
    require_same(header.leaves, infos, str(path), models)


def _agreed(mine: list[str], others: str) -> list[str]:
    return [] if agreement.all_agree(not mine) else mine or [others]


def _load(path: Path, wanted: Mapping[str, Any], header: Header) -> tuple[list[Any], list[str]]:
    """The leaves, or what the array store found damaged although the checksums matched."""
    try:
        arrays = store.load(path, leaves.to_targets(wanted, header.leaves))
    except Exception as error:  # only damage may be answered by an older step
        text = str(error)[:300]
        if "DATA_LOSS" in text:
            return [], [f"the arrays were written damaged: {text}"]
        raise CheckpointError(f"{path} is intact but could not be loaded: {text}") from error
    return leaves.from_arrays(arrays, wanted, header.leaves), []


def _changed(restored: list[Any], wanted: Mapping[str, Any], header: Header) -> list[str]:
    """Leaves whose values are not those that were saved."""
    now = as_text(fingerprint(dict(zip(wanted, restored, strict=True))))
    return [
        f"{name}: values changed since they were saved (fingerprint {now[name]}, saved {saved})"
        for name, saved in header.fingerprints.items()
        if now[name] != saved
    ]
