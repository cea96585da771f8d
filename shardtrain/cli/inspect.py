"""`shardtrain inspect`: what is in a checkpoint, and whether its files are intact."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from shardtrain.cli.arguments import parse, plain

EXAMPLES = (
    ("shardtrain inspect runs/small-stdlib", "the newest step of a run"),
    ("shardtrain inspect runs/small-stdlib --step 80", "an older one"),
    ("shardtrain inspect runs/small-stdlib/80", "the same, by its path"),
)


@dataclass(frozen=True)
class InspectOptions:
    """Say what is in a checkpoint: its step, arrays, mesh and model. Every file is checked.

    Needs no model code and no particular devices. The exit code is 1 if a file is damaged.

    Args:
      path: A run directory, or one step of it.
      step: Of a run directory. Default: the newest complete one.
    """

    path: Annotated[Positional[Path], arg(metavar="DIR")]
    step: Annotated[int | None, plain("N")] = None


def main(arguments: Sequence[str]) -> int:
    """Print the description of a checkpoint."""
    options = parse(InspectOptions, arguments, command="inspect", examples=EXAMPLES)
    found = importlib.import_module("shardtrain.checkpoint").inspect(options.path, options.step)
    importlib.import_module("rich.console").Console(highlight=False).print(found)
    return 1 if found.problems else 0
