"""`shardtrain goodput`: what failures at a published rate leave of a big run's time."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from shardtrain.cli.arguments import parse, plain

EXAMPLES = (
    ("shardtrain goodput", "16,384 devices, as often interrupted as the Llama 3 405B run"),
    ("shardtrain goodput --devices 1024 --stall 0.15 --recovery 45", "what you measured"),
    ("shardtrain goodput --stall 20 --recovery 900 --interval 1800", "rare saves, slow restarts"),
)


@dataclass(frozen=True)
class GoodputOptions:
    """Say what goodput follows from a failure rate, the stall of a save and the time to recover.

    The rate is that of Llama 3 405B: 466 interruptions in 54 days on 16,384 GPUs; each device fails
    independently. Measure the other two: the stall by benchmarks/checkpoint.py (seconds that `save`
    blocks), the recovery by benchmarks/faults.py (from a failure to the first new step).

    Args:
      devices: Accelerators of the run.
      stall: Seconds that a save holds up the training.
      recovery: Seconds from a failure to the first new step; repeated work not included.
      interval: Seconds between saves. Default: the best.
    """

    devices: Annotated[int, arg(metavar="N")] = 16384
    stall: Annotated[float, arg(metavar="SECONDS")] = 1.0
    recovery: Annotated[float, arg(metavar="SECONDS")] = 120.0
    interval: Annotated[float | None, plain("SECONDS")] = None


def main(arguments: Sequence[str]) -> int:
    """Print the report."""
    options = parse(GoodputOptions, arguments, command="goodput", examples=EXAMPLES)
    report = importlib.import_module("shardtrain.monitoring.goodput").goodput_report
    print(
        report(options.devices, options.stall, options.recovery, interval=options.interval),
    )
    return 0
