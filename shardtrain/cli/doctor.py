"""`shardtrain doctor`: measure this machine and say what is wrong with it."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from shardtrain.cli.arguments import parse, plain

EXAMPLES = (
    ("shardtrain doctor", "rates, versions, problems; kept for --hardware local"),
    ("shardtrain doctor --mesh data=2,tensor=4", "the links of each mesh axis"),
    ("shardtrain explore llama3-8b --hardware local", "plan with what was measured"),
)


@dataclass(frozen=True)
class DoctorOptions:
    """Measure matmul, memory, links, host copies and disk of this machine; list problems.

    The figures are kept, and `--hardware local` (`st.hardware("local")`) plans with them. The exit
    code is 1 if there are problems.

    Args:
      mesh: Axes whose links are measured, for example data=2,tensor=4. Default: all as one.
      directory: Where runs will be saved: its disk is measured. Default: the current one.
      devices: Virtual CPU devices where there is no accelerator.
      dry: Measure and print, keep nothing.
    """

    mesh: Annotated[str | None, plain("AXES")] = None
    directory: Annotated[str, plain("DIRECTORY")] = "."
    devices: Annotated[int | None, plain("N")] = None
    dry: Annotated[bool, plain()] = False


def main(arguments: Sequence[str]) -> int:
    """Parse the options, then import what measuring needs."""
    options = parse(DoctorOptions, arguments, command="doctor", examples=EXAMPLES)
    return importlib.import_module("shardtrain.cli.doctor_run").run(options)
