"""The run directory: which one, and whether it belongs to this run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtrain.errors import CheckpointError

SETTINGS = "run.json"


def choose_directory(out: Path | None, name: str, fresh: bool) -> Path:
    """`out` or `runs/<name>`; with `fresh`, the first of `-2`, `-3`, ... that does not exist."""
    base = Path("runs") / name if out is None else out.expanduser()
    if not fresh or not base.exists():
        return base
    number = 2
    while (found := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return found


def claim(directory: Path, settings: Mapping[str, Any], may_change: tuple[str, ...]) -> bool:
    """Check that a directory is new, or was made with these settings; nothing is written.

    Args:
      directory: The run directory.
      settings: JSON values that decide what the run computes.
      may_change: Names that may differ when a run continues.

    Returns:
      Whether a run is there to continue.

    Raises:
      CheckpointError: It belongs to another run (lists the differences), or is something else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    file = directory / SETTINGS
    if not file.is_file():
        what = "is not a directory" if not directory.is_dir() else _contents(directory)
        raise CheckpointError(
            f"{directory} {what}; choose another directory with --out. Nothing was overwritten."
        )
    try:
        saved = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}. Use another --out.") from error
    saved, now = _flat(saved), _flat(json.loads(json.dumps(settings)))
    changed = [
        f"  {name}: {saved.get(name)} there, {now[name]} now"
        for name in now
        if name not in may_change and saved.get(name) != now[name]
    ]
    if changed:
        raise CheckpointError(
            f"{directory} holds another run:\n" + "\n".join(changed) + "\nGive the former options "
            "to continue it, or start a new one with --fresh or --out DIR. Nothing was overwritten."
        )
    return True


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Record what the run computes; replaced as a whole, never half written."""
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / (SETTINGS + ".new")
    fresh.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    os.replace(fresh, directory / SETTINGS)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as `outer.inner: value`, so that a difference names what differs."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    return flat


def _contents(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return f"was not made by `shardtrain train` (it holds {', '.join(names[:5])})"
