"""`shardtrain explore`: which layout, on which chips, and why not the others."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from shardtrain.cli.arguments import parse, plain

EXAMPLES = (
    ("shardtrain explore llama3-8b --hardware h100:8x8", "a model of the catalogue"),
    ("shardtrain explore llama3-70b --hardware h200:4x8,v5p:4x4x4 --html report.html",
     "two machines, as a page"),
    ("shardtrain explore train.py:problem --hardware h100:8x8 --compile-top 3",
     "your own model, the best three through the real compiler"),
    ("shardtrain explore llama3-8b --limit tensor=1,2 --limit remat=full", "only some layouts"),
)  # fmt: skip


@dataclass(frozen=True)
class ExploreOptions:
    """Rank every layout of a model on chips you may not have: time, memory, cost, reasons.

    The exit code is 1 if nothing fits; the cheapest change that would is printed.

    Args:
      model: A catalogue name, or FILE.py:NAME, a function without arguments that returns
        (model, loss_fn, optimizer, batch).
      hardware: Chips: hosts x chips per host, or a TPU topology; several with commas.
      global_batch: Sequences per step, of a catalogue model. Default: four million tokens.
      sequence: Tokens per sequence, of a catalogue model. Default: 4096.
      rank: What is best: time, memory or cost.
      price: Dollars per chip-hour, one number or h100=2.5,v5p=4.2. Default: cost in chip-seconds.
      limit: Values to try of one field, for example tensor=1,2 (may be repeated).
      compile_top: Compile the best few with the hardware's real compiler (your own model).
      rows: Families of layouts shown.
      html: Write a self-contained page there.
      png: Write the figures there.
      json: Write everything as JSON there.
      models: List the catalogue and stop.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")] = "llama3-8b"
    hardware: Annotated[str, arg(metavar="CHIPS")] = "h100:8x8"
    global_batch: Annotated[int | None, plain("N")] = None
    sequence: Annotated[int | None, plain("N")] = None
    rank: Annotated[str, arg(metavar="WHAT")] = "time"
    price: Annotated[str | None, plain("DOLLARS")] = None
    limit: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUES", help_behavior_hint="")] = ()
    compile_top: Annotated[int, plain("N")] = 0
    rows: Annotated[int, arg(metavar="N")] = 12
    html: Annotated[str | None, plain("FILE")] = None
    png: Annotated[str | None, plain("FILE")] = None
    json: Annotated[str | None, plain("FILE")] = None
    models: Annotated[bool, plain()] = False


def main(arguments: Sequence[str]) -> int:
    """Parse the options, then import what exploring needs."""
    options = parse(ExploreOptions, arguments, command="explore", examples=EXAMPLES)
    return importlib.import_module("shardtrain.cli.explore_run").run(options)
