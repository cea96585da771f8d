"""`shardtrain train`: a decoder language model on text, from nothing to a sample."""

import importlib
from collections.abc import Sequence

from shardtrain.cli.arguments import parse
from shardtrain.cli.train.options import EXAMPLES, TrainOptions


def main(arguments: Sequence[str]) -> int:
    """Parse the options, then import what training needs."""
    options = parse(TrainOptions, arguments, command="train", examples=EXAMPLES)
    return importlib.import_module("shardtrain.cli.train.run").run(options)
