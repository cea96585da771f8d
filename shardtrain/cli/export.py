"""`shardtrain export`: the parameters of a checkpoint as one safetensors file."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from shardtrain.cli.arguments import parse, plain

EXAMPLES = (
    ("shardtrain export runs/small-stdlib model.safetensors", "the newest step"),
    ("shardtrain export runs/small-stdlib moments.safetensors --only opt_state", "other arrays"),
)


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint's parameters to a .safetensors file that other tools read.

    Needs no model code and no particular devices, and the host memory of the largest array only.

    Args:
      path: A run directory, or one step of it.
      file: To write. Replaced only when the new one is complete.
      step: Of a run directory. Default: the newest complete one.
      only: Which arrays: a name or the beginning of names; "all" for the whole state.
    """

    path: Annotated[Positional[Path], arg(metavar="DIR")]
    file: Annotated[Positional[Path], arg(metavar="FILE")]
    step: Annotated[int | None, plain("N")] = None
    only: Annotated[str, arg(metavar="NAME")] = "params"


def main(arguments: Sequence[str]) -> int:
    """Write the file and say so."""
    options = parse(ExportOptions, arguments, command="export", examples=EXAMPLES)
    export = importlib.import_module("shardtrain.checkpoint").export
    only = None if options.only == "all" else options.only
    written = export(options.path, options.file, options.step, only)
    print(f"wrote {written} ({written.stat().st_size:,} bytes)")
    return 0
