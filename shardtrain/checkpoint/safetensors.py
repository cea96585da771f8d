"""Weights from elsewhere, in the one format that cannot carry code.

Design: `map_file` gives arrays that are views of the mapped file. Slicing, transposing and
splitting them reads nothing; copying a slice reads that slice, and `MappedFile.release` gives the
pages back.

Source: the format is that of huggingface/safetensors (README).
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from shardtrain.errors import CheckpointError

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""numpy / ml_dtypes name -> the name in a file."""

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


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The beginning of a file whose tensors follow in this order.

    Args:
      tensors: Name -> dtype (a key of `DTYPES`) and shape.
      metadata: Texts for the reader.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        offsets = [offset, offset + size]
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class MappedFile:
    """A file of tensors, mapped into memory.

    Args:
      path: The file.
      header_bytes: Where the tensors' data begins.
      tensors: Name -> view of the file.
      memory: The mapping.
    """

    path: Path
    header_bytes: int
    tensors: Mapping[str, np.ndarray]
    memory: mmap.mmap

    def release(self) -> None:
        """Give back the memory of what was read; the tensors stay usable."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            self.memory.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path, writable: bool = False) -> MappedFile:
    """Map a file; nothing but its header is read.

    Args:
      path: A `.safetensors` file.
      writable: Assignments to the tensors change the file.

    Raises:
      CheckpointError: There is no such file, or its header is not that of the format.
    """
    try:
        with safetensors.safe_open(path, "numpy"):
            pass  # it checks the header: sizes, offsets, overlaps
        with path.open("r+b" if writable else "rb") as file:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            memory = mmap.mmap(file.fileno(), 0, access=access)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    start = 8 + struct.unpack("<Q", memory[:8])[0]
    entries = json.loads(memory[8:start])
    entries.pop("__metadata__", None)
    known = {name: dtype for dtype, name in DTYPES.items()}
    if strange := {e["dtype"] for e in entries.values()} - known.keys():
        raise CheckpointError(f"{path}: dtypes {sorted(strange)} are not read here")

    def view(entry: Mapping[str, Any]) -> np.ndarray:
        dtype, shape = jnp.dtype(known[entry["dtype"]]), tuple(entry["shape"])
        if not math.prod(shape):
            return np.empty(shape, dtype)
        first = start + entry["data_offsets"][0]
        return np.frombuffer(memory, dtype, math.prod(shape), first).reshape(shape)

    return MappedFile(path, start, {name: view(e) for name, e in entries.items()}, memory)
