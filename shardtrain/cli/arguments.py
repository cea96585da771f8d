"""From a frozen dataclass of options to a parsed command line, by tyro."""

import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")


def plain(metavar: str | None = None) -> Any:
    """Annotation of an option whose help text already says what happens without it."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


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
    description = inspect.cleandoc(options.__doc__ or "").partition("Args:")[0].strip()
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
