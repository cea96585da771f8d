"""Weights from elsewhere, in the one format that cannot carry code."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from shardtrain.errors import CheckpointError

SUFFIX = ".safetensors"
_MAY_EXECUTE = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")


def is_file(path: Path) -> bool:
    """Whether this is a file of weights and not a directory of checkpoints.

    Raises:
        CheckpointError: a format that can hold code.
    """
    if path.suffix in _MAY_EXECUTE and not path.is_dir():
        raise CheckpointError(
            f"{path.name}: shardtrain reads its own checkpoints and {SUFFIX} files. A "
            f"{path.suffix} file can execute code when it is read; convert it where you trust it."
        )
    return path.suffix == SUFFIX


def load(path: Path) -> dict[str, Any]:
    """Name → numpy array, as the file has them; dims and dtypes are checked by the format.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
