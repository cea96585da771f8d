"""What `shardtrain doctor` does once its options are read."""

import jax
from rich.console import Console

from shardtrain.cli.doctor import DoctorOptions
from shardtrain.doctor import examine
from shardtrain.mesh import simulate
from shardtrain.strategy import Strategy


def run(options: DoctorOptions) -> int:
    """Measure, print, keep; 1 if there are problems."""
    if options.devices is not None and jax.devices()[0].platform == "cpu":
        simulate(options.devices, reset=True)
    axes = None
    if options.mesh is not None:
        sizes = Strategy.parse(options.mesh).sizes
        axes = {name: size for name, size in sizes.items() if size > 1}
    found = examine(axes, options.directory)
    console = Console(highlight=False)
    console.print(found)
    if not options.dry:
        console.print(f"kept for --hardware local: {found.save()}", markup=False)
    return 1 if found.problems else 0
