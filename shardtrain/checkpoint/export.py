"""Export to safetensors: a format that other tools read and that cannot carry code.

The file is written leaf by leaf, so it needs the host memory of the largest leaf only.
"""

import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

from shardtrain.checkpoint import manifest, portable, steps
from shardtrain.checkpoint.header import Header
from shardtrain.checkpoint.leaves import LeafInfo
from shardtrain.errors import CheckpointError

# numpy / ml_dtypes name → safetensors name (format of huggingface/safetensors, README)
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def export(
    path: str | os.PathLike[str],
    file: str | os.PathLike[str],
    step: int | None = None,
    only: str | None = "params",
) -> Path:
    """Write the parameters of a checkpoint to a `.safetensors` file.

    Args:
        path: a run directory or one step of it.
        file: to write; replaced only when the new one is complete.
        step: of a run directory; default the newest complete one.
        only: which leaves: a name or the beginning of names; None for the whole state.

    Returns:
        The absolute path written. Tensors are called by their path below `only`, joined by `/`.

    Raises:
        CheckpointError: the checkpoint is damaged, or a dtype has no safetensors form.
    """
    directory = portable.verified_step(path, step)
    header = manifest.read_header(directory)
    names = portable.select(header, only)
    target = steps.resolve(file)
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as out:
            _write_header(out, header, names, only)
            for _, value in portable.read_leaves(directory, header, names):
                out.write(value.tobytes())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _write_header(out: BinaryIO, header: Header, names: list[str], only: str | None) -> None:
    metadata = {"format": "np", "step": str(header.step), "producer": "shardtrain"}
    entries: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name in names:
        info = header.leaves[name]
        entries[_shortened(name, only)] = {
            "dtype": _dtype(name, info),
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)


def _shortened(name: str, only: str | None) -> str:
    prefix = "" if only is None else only.strip("/")
    return name.removeprefix(prefix).lstrip("/") or name.split("/")[-1]


def _dtype(name: str, info: LeafInfo) -> str:
    if info.dtype not in _DTYPES:
        raise CheckpointError(
            f"{name} is {info}, which safetensors cannot hold. Export other leaves with `only`."
        )
    return _DTYPES[info.dtype]
