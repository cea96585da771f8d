"""A checkpoint of somebody else's, on disk: one or several safetensors files and a config."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardtrain.checkpoint import safetensors
from shardtrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_ALONE = "model.safetensors"


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint as views of its files.

    Args:
      directory: Where it lies.
      files: In the order of their names.
    """

    directory: Path
    files: tuple[safetensors.MappedFile, ...]

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Name -> view."""
        return {name: view for file in self.files for name, view in file.tensors.items()}

    @property
    def model_type(self) -> str | None:
        """The family, as `config.json` says; None without one."""
        file = self.directory / "config.json"
        return _read_json(file).get("model_type") if file.exists() else None

    def release(self) -> None:
        """Give back the memory of what was read so far."""
        for file in self.files:
            file.release()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Map the files of a checkpoint; nothing but their headers is read.

    Args:
      path: A directory with `model.safetensors`, or with `model.safetensors.index.json` and the
        files it names; or one `.safetensors` file.

    Raises:
      CheckpointError: There is no such checkpoint, it is damaged, or it is in a format that can
        hold code.
    """
    given = Path(path).expanduser().absolute()
    if safetensors.is_file(given):
        return Source(given.parent, (safetensors.map_file(given),))
    names = _file_names(given)
    files = tuple(safetensors.map_file(given / name) for name in sorted(set(names.values())))
    if (given / INDEX).exists():
        _check_index(given / INDEX, names, files)
    return Source(given, files)


def _file_names(directory: Path) -> dict[str, str]:
    """Tensor -> file; for a single file only the file."""
    index = directory / INDEX
    if not index.exists():
        if (directory / _ALONE).exists():
            return {"": _ALONE}
        there = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
        raise CheckpointError(
            f"{directory} has neither {_ALONE} nor {INDEX}; there are: {', '.join(there[:12])}. "
            "Other formats (.bin, .pt) can execute code: convert them where you trust them"
        )
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map")
    for name in names.values():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(f"{index} names {name!r}, which is no file of this directory")
    return names


def _check_index(
    index: Path, names: Mapping[str, str], files: tuple[safetensors.MappedFile, ...]
) -> None:
    there = {tensor: file.path.name for file in files for tensor in file.tensors}
    count = sum(len(file.tensors) for file in files)
    wrong = sorted(t for t in names.keys() | there.keys() if names.get(t) != there.get(t))
    if wrong or count != len(there):
        raise CheckpointError(
            f"{index} and the files disagree about {len(wrong)} tensors, e.g. {wrong[:3]}: "
            "is the download complete?"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected an object")
    return found
