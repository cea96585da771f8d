"""The `shardtrain` command.

Design: this file knows each command's name and one line about it, nothing else, so that `--help`
answers at once; what a command needs (JAX, Flax, Orbax) is imported when it runs.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from shardtrain.errors import ShardtrainError, suggest


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
      summary: One line for `shardtrain --help`.
      module: Where its `main(arguments) -> exit code` is.
    """

    summary: str
    module: str


COMMANDS = {
    "train": Command("train a language model on text, sharded", "shardtrain.cli.train"),
    "explore": Command("rank every layout of a model on any chips", "shardtrain.cli.explore"),
    "verify": Command("compare sharded training with one device", "shardtrain.cli.verify"),
    "launch": Command("run several processes on this machine, supervised", "shardtrain.cli.launch"),
    "doctor": Command("measure this machine and find problems", "shardtrain.cli.doctor"),
    "inspect": Command("say what is in a checkpoint", "shardtrain.cli.inspect"),
    "export": Command("write a checkpoint's parameters as safetensors", "shardtrain.cli.export"),
    "replay": Command("find where a bad step begins to be not finite", "shardtrain.cli.replay"),
    "goodput": Command("training time left by failures at a known rate", "shardtrain.cli.goodput"),
}

_EXAMPLES = (
    ("shardtrain train", "8 virtual CPU devices where there is no accelerator"),
    ("shardtrain train --data notes.txt", "your own text"),
    ("shardtrain train --strategy data=4,tensor=2", "another layout"),
    ("shardtrain inspect runs/small-stdlib", "what a run has saved"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 (a bug), 2 (your input), 130 (interrupted).

    Args:
      arguments: Those after `shardtrain`; None: the process's own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(importlib.import_module("shardtrain").__version__)
        return 0
    try:
        if name not in COMMANDS:
            raise ShardtrainError(f"no command {name!r}: {suggest(name, COMMANDS)}")
        return importlib.import_module(COMMANDS[name].module).main(rest)
    except ShardtrainError as error:
        if os.environ.get("SHARDTRAIN_TRACEBACK"):
            raise
        print(f"shardtrain {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nshardtrain {name}: interrupted", file=sys.stderr)
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    wide = max(len(line) for line, _ in _EXAMPLES)
    examples = "\n".join(f"  {line:<{wide}}  # {note}" for line, note in _EXAMPLES)
    return (
        "usage: shardtrain COMMAND [options]\n\n"
        "Sharded training for unmodified Flax models.\n\n"
        f"commands:\n{commands}\n\n"
        f"examples:\n{examples}\n\n"
        "`shardtrain COMMAND --help` says more. Errors in your input end with code 2 and one\n"
        "message; SHARDTRAIN_TRACEBACK=1 shows where they come from."
    )
