"""`shardtrain verify`: a strategy against the same training on one device."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from shardtrain.cli.arguments import parse, plain

EXAMPLES = (
    ("shardtrain verify", "the small decoder under data=2,fsdp=2,tensor=2"),
    ("shardtrain verify --strategy fsdp=4,num_microbatches=2", "another strategy"),
    ("shardtrain verify train.py:problem --strategy data=2,tensor=4", "a model of your own"),
)


@dataclass(frozen=True)
class VerifyOptions:
    """Compare sharded training with one device: loss, gradients and parameters, per array.

    The exit code is 1 if they differ by more than float32 rounding explains.

    Args:
      problem: FILE.py:NAME, a function without arguments that returns
        (model, loss_fn, optimizer, batch). Default: a tiny decoder.
      strategy: What to verify. Default: data=2,fsdp=2,tensor=2 on virtual devices.
      devices: Virtual CPU devices where there is no accelerator.
      steps: Steps to compare.
      table: Print the error of every array.
    """

    problem: Annotated[Positional[str | None], plain("FILE.py:NAME")] = None
    strategy: Annotated[str | None, plain("STRING")] = None
    devices: Annotated[int | None, plain("N")] = None
    steps: Annotated[int, arg(metavar="N")] = 2
    table: Annotated[bool, plain()] = False


def main(arguments: Sequence[str]) -> int:
    """Parse the options, then import what verifying needs."""
    options = parse(VerifyOptions, arguments, command="verify", examples=EXAMPLES)
    return importlib.import_module("shardtrain.cli.verify_run").run(options)
