"""`shardtrain launch`: several processes on this machine, supervised."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from shardtrain.cli.arguments import parse, plain
from shardtrain.errors import DistributedError

EXAMPLES = (
    ("shardtrain launch -n 4 -- python train.py --lr 3e-4", "four processes"),
    (
        "shardtrain launch -n 2 --devices-per-process 4 -- shardtrain train --strategy fsdp=8",
        "two processes, four devices each",
    ),
)


@dataclass(frozen=True)
class LaunchOptions:
    """Start a command in several processes, watch them, restart them after a failure.

    What comes after -- is the command. Its script calls st.init_distributed() first and needs no
    other change. The exit code is 0 when done, 42 when stopped with everything saved, 75 after a
    hang, else that of the process that failed first.

    Args:
      num_processes: Processes on this machine.
      devices_per_process: GPUs of each, or virtual CPU devices where there is no GPU. Default: all
        GPUs in equal shares.
      shrink_to: Smaller numbers of processes that also work, used when one does not come back.
      max_restarts: Restarts without progress before giving up.
      hang_timeout: Seconds without progress that count as a hang, in every phase. Default: by
        phase, minutes for a step and an hour for compiling.
      run_directory: For logs and reports. Default: a temporary one, removed after success.
      output: all (every process, with a prefix), first (process 0 as it is) or none.
    """

    num_processes: Annotated[int, arg(metavar="N", aliases=["-n"])]
    devices_per_process: Annotated[int | None, plain("N")] = None
    shrink_to: Annotated[tuple[int, ...], plain("N ...")] = ()
    max_restarts: Annotated[int, arg(metavar="N")] = 3
    hang_timeout: Annotated[float | None, plain("SECONDS")] = None
    run_directory: Annotated[Path | None, plain("DIR")] = None
    output: Annotated[str, arg(metavar="all|first|none")] = "all"


def main(arguments: Sequence[str]) -> int:
    """Launch what comes after `--`."""
    own, command = _split(arguments)
    if not command and not {"-h", "--help"} & set(own):
        raise DistributedError(
            "write the command to start after --, for example: "
            "shardtrain launch -n 2 -- python train.py"
        )
    options = parse(LaunchOptions, own, command="launch", examples=EXAMPLES)
    return importlib.import_module("shardtrain.launch.supervisor").launch(
        command,
        options.num_processes,
        options.devices_per_process,
        shrink_to=options.shrink_to,
        max_restarts=options.max_restarts,
        hang_timeouts=options.hang_timeout,
        run_directory=options.run_directory,
        output=options.output,
    )


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of ours, and what comes after `--`."""
    listed = list(arguments)
    at = listed.index("--") if "--" in listed else len(listed)
    return listed[:at], listed[at + 1 :]
