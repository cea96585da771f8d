"""The run directory: which steps are there, setting bad ones aside, deleting old ones.

A step is a directory named by its number. Nothing that shardtrain did not write is touched, and
nothing that might still be wanted is deleted: a damaged step is renamed to `N.corrupt`, one saved
while replicas differed to `N.suspect`, one that a restart from an earlier step replaced to
`N.superseded`.
"""

import os
import re
import shutil
from pathlib import Path

from shardtrain.checkpoint import manifest, store
from shardtrain.errors import CheckpointError

_LEFTOVER = re.compile(rf"^\d+({re.escape(store.TEMPORARY)}.*|\.deleting)$")
_OURS = frozenset({manifest.FOLDER, store.ARRAYS, "_CHECKPOINT_METADATA", "commit_success.txt"})


def resolve(directory: str | os.PathLike[str]) -> Path:
    """An absolute path; `~` and relative paths mean what they mean in a shell."""
    return Path(directory).expanduser().absolute()


def step_path(directory: Path, step: int) -> Path:
    """Where `step` lies."""
    return directory / str(step)


def present(directory: Path) -> list[int]:
    """All steps in the directory, whole or not, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if _is_step(p))


def committed(directory: Path) -> list[int]:
    """Steps whose manifest is complete, ascending."""
    return [s for s in present(directory) if manifest.is_complete(step_path(directory, s))]


def _is_step(path: Path) -> bool:
    if not re.fullmatch(r"0|[1-9]\d*", path.name) or not path.is_dir():
        return False
    try:
        inside = {p.name for p in path.iterdir()}
    except FileNotFoundError:  # deleted by retention since it was listed
        return False
    return not inside or bool(inside & _OURS)


def set_aside(directory: Path, step: int, suffix: str) -> Path:
    """Rename a step to `N.suffix` (or `N.suffix-2`, ...): out of the way, but not lost."""
    target = directory / f"{step}.{suffix}"
    number = 2
    while target.exists():
        target = directory / f"{step}.{suffix}-{number}"
        number += 1
    step_path(directory, step).rename(target)
    return target


def delete(directory: Path, step: int) -> None:
    """Delete a step; a crash half-way leaves `N.deleting`, never something that looks whole."""
    doomed = directory / f"{step}.deleting"
    shutil.rmtree(doomed, ignore_errors=True)
    step_path(directory, step).rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(directory: Path) -> list[str]:
    """Remove what a killed save or deletion left behind; it also holds disk space."""
    names = [p.name for p in directory.iterdir() if _LEFTOVER.match(p.name)]
    for name in names:
        shutil.rmtree(directory / name, ignore_errors=True)
    return names


def retain(
    directory: Path, max_to_keep: int | None, pinned: frozenset[int] = frozenset()
) -> list[int]:
    """Delete the oldest complete steps beyond `max_to_keep`; never the newest, never `pinned`."""
    if max_to_keep is None:
        return []
    free = [step for step in committed(directory) if step not in pinned]
    old = free[: -max(1, max_to_keep)]
    for step in old:
        delete(directory, step)
    return old


def require_free(directory: Path, step: int) -> None:
    """Refuse to save where something lies that is not a step of ours."""
    path = step_path(directory, step)
    if path.exists():
        raise CheckpointError(
            f"{path} exists and is not a checkpoint of shardtrain. Move it away, or choose another "
            "directory; nothing was overwritten."
        )


def locate(path: str | os.PathLike[str]) -> tuple[Path, list[int]]:
    """The run directory and its complete steps, given a run directory or one step of it.

    Raises:
        CheckpointError: there is no complete step; says what was found instead.
    """
    root = resolve(path)
    if not root.is_dir():
        raise CheckpointError(f"no checkpoint directory {root}.")
    if (root / manifest.FOLDER).is_dir() and _is_step(root):
        if manifest.is_complete(root):
            return root.parent, [int(root.name)]
        raise CheckpointError(f"{root} is not complete: its manifest is missing or damaged.")
    found = committed(root)
    if not found:
        nested = [p.name for p in root.iterdir() if p.is_dir() and present(p)]
        hint = f" Did you mean {root / nested[0]}?" if nested else ""
        names = sorted(p.name for p in root.iterdir())[:8]
        raise CheckpointError(f"no complete step in {root} (it holds: {names}).{hint}")
    return root, found
