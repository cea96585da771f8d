"""`shardtrain replay`: a bad step of a run once more, with a look at every module."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from shardtrain.cli.arguments import parse, plain

EXAMPLES = (
    ("shardtrain replay runs/small-stdlib", "the last bad step of a `shardtrain train` run"),
    ("shardtrain replay runs/a --problem train.py:problem", "of a run of your own script"),
    ("shardtrain replay runs/a --problem train.py:problem --step 812", "any step"),
)


@dataclass(frozen=True)
class ReplayOptions:
    """Re-execute a bad step and name the first thing in it that is not finite.

    It starts from the checkpoint that was kept for it, repeats the steps up to the bad one with the
    same batches, and looks at the batch, the parameters (each copy on each device), the output of
    every module, and the gradients. The run directory is not changed. The exit code is 1 if
    something is not finite.

    Args:
      directory: The run directory, with bad_steps.jsonl.
      step: Its number in the metrics. Default: the last bad one.
      problem: FILE.py:NAME, a function without arguments that returns
        (model, loss_fn, optimizer, loader) of the run. Default: what `shardtrain train` recorded.
      strategy: Default: that of the run.
      devices: Virtual CPU devices where there is no accelerator.
    """

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    step: Annotated[int | None, plain("N")] = None
    problem: Annotated[str | None, plain("FILE.py:NAME")] = None
    strategy: Annotated[str | None, plain("STRING")] = None
    devices: Annotated[int | None, plain("N")] = None


def main(arguments: Sequence[str]) -> int:
    """Parse the options, then import what replaying needs."""
    options = parse(ReplayOptions, arguments, command="replay", examples=EXAMPLES)
    return importlib.import_module("shardtrain.cli.replay_run").run(options)
