"""From a frozen dataclass of options to a parsed command line, by tyro."""

from collections.abc import Sequence
from typing import TypeVar

import tyro

Options = TypeVar("Options")


def parse(
    options: type[Options],
    arguments: Sequence[str],
    *,
    command: str,
    examples: Sequence[tuple[str, str]] = (),
) -> Options:
    """Read options; `--help` and a wrong option (the nearest is suggested) exit by themselves.

    Args:
      options: Dataclass; its docstring documents the fields.
      arguments: Those after the command.
      command: Its name.
      examples: (command line, what it does) pairs, shown by `--help`.
    """
    description = (options.__doc__ or "").partition("Args:")[0].strip()
    if examples:
        shown = "\n".join(f"  {line}\n    {note}" for line, note in examples)
        description += f"\n\nexamples:\n{shown}"
    return tyro.cli(
        options,
        args=list(arguments),
        prog=f"shardtrain {command}",
        description=description,
        config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.FlagCreatePairsOff),
    )
