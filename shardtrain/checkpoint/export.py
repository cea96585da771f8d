"""Export to safetensors: a format that other tools read and that cannot carry code.

The file is written leaf by leaf, so it needs the host memory of the largest leaf only.
"""

import os
from pathlib import Path
from typing import BinaryIO

from shardtrain.checkpoint import manifest, portable, safetensors, steps
from shardtrain.checkpoint.header import Header
from shardtrain.errors import CheckpointError


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
    tensors = {}
    for name in names:
        info = header.leaves[name]
        if info.dtype not in safetensors.DTYPES:
            raise CheckpointError(
                f"{name} is {info}, which safetensors cannot hold. Export other leaves with `only`."
            )
        tensors[_shortened(name, only)] = (info.dtype, info.shape)
    out.write(safetensors.encode_header(tensors, metadata))


def _shortened(name: str, only: str | None) -> str:
    prefix = "" if only is None else only.strip("/")
    return name.removeprefix(prefix).lstrip("/") or name.split("/")[-1]
