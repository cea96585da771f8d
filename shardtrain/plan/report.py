"""The start-up summary of a plan, its pictures, and all tables together."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Group

from shardtrain.hardware import chip_of_device, measured_locally
from shardtrain.hardware import hardware as find_hardware
from shardtrain.modules import ModelForm
from shardtrain.partitioning.rules import as_axes
from shardtrain.plan.explain import device_bytes
from shardtrain.plan.layout import Layout
from shardtrain.planner.targets import compiler_for
from shardtrain.strategy import Strategy
from shardtrain.tables import Table, bytes_text
from shardtrain.xla_options import describe_xla


@dataclass(frozen=True)
class Report:
    """Several tables: rich in terminals, HTML in notebooks."""

    tables: tuple[Any, ...]

    def __rich__(self) -> Group:
        return Group(*self.tables)

    def __str__(self) -> str:
        return "\n".join(str(t) for t in self.tables)

    def _repr_html_(self) -> str:
        shown = (getattr(t, "_repr_html_", None) for t in self.tables)
        return "\n".join(show() for show in shown if show is not None)


def summary_table(form: ModelForm, layout: Layout, s: Strategy, hardware: str | None) -> Table:
    """What a run prints when it starts."""
    sizes = layout.sizes
    mesh = " x ".join(f"{a}={n}" for a, n in sizes.items() if n > 1) or "one device"
    params = jax.tree.leaves(layout.state.params)
    count = sum(math.prod(x.shape) for x in params)
    total = sum(p.nbytes for p in layout.params.values())
    rows = (
        ("model", f"{form.name} ({form.kind}), {count:,} parameters, {bytes_text(total)}"),
        ("devices", hardware or _devices(layout.mesh)),
        ("mesh", mesh),
        ("strategy", str(s)),
        ("compiler", describe_xla(s.xla, plan_platform(layout.mesh, hardware))),
        ("batch", batch_arithmetic(layout, s)),
        ("parameters", _sharded(layout, s)),
        (
            "each device",
            f"parameters {bytes_text(device_bytes(layout.state.params))}, optimizer "
            f"{bytes_text(device_bytes(layout.state.opt_state))}, batch "
            f"{bytes_text(device_bytes(layout.batch))}",
        ),
    )
    return Table("Plan", ("", ""), rows)


def batch_arithmetic(layout: Layout, s: Strategy) -> str:
    """`global batch 32 = data 2 x fsdp 2 x microbatches 1 x 8 rows`."""
    rows = next(x.shape[0] for x in jax.tree.leaves(layout.batch) if x.shape)
    axes = {a: layout.sizes[a] for a in layout.batch_axes}
    each = rows // (math.prod(axes.values()) * s.num_microbatches)
    parts = [f"{a} {n}" for a, n in axes.items()]
    parts += [f"microbatches {s.num_microbatches}", f"{each} rows"]
    return f"global batch {rows} = " + " x ".join(parts)


def _sharded(layout: Layout, s: Strategy) -> str:
    """How many parameters go over which axes."""
    counts: dict[str, int] = {}
    for plan in layout.params.values():
        axes = sorted({a for entry in plan.spec(s.zero == 3) for a in as_axes(entry)})
        name = "+".join(axes) or "replicated"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(
        f"{n} over {a}" if a != "replicated" else f"{n} {a}" for a, n in counts.items()
    )


def _devices(mesh: Any) -> str:
    device = mesh.devices.flat[0]
    processes = len({d.process_index for d in mesh.devices.flat})
    across = f" in {processes} processes" if processes > 1 else ""
    return f"{mesh.size} {device.platform.upper()} ({device.device_kind}){across}"


def plan_platform(mesh: Any, hardware: str | None) -> str:
    """`cpu`, `gpu` or `tpu`: whose compiler makes a plan's programs."""
    if hardware is None:
        return mesh.devices.flat[0].platform
    return compiler_for(find_hardware(hardware))[0]


def local_hardware(mesh: Any) -> str:
    """The hardware string of this machine's devices, for estimates; as `doctor` measured them."""
    kind = mesh.devices.flat[0].device_kind
    if measured_locally(kind, mesh.size):
        return f"local:1x{mesh.size}"
    listed = chip_of_device(kind)
    return f"{listed.name}:1x{mesh.size}" if listed and listed.kind == "gpu" else f"cpu:{mesh.size}"


def plan_figures(plan: Any, path: str | None) -> dict[str, Any]:
    """The mesh, the largest parameters on it, and memory."""
    from shardtrain import viz  # here: matplotlib takes as long to import as all the rest

    figures = {
        "mesh": viz.mesh_figure(plan.mesh, str(plan.strategy)),
        "parameters": viz.parameters_figure(plan),
        "memory": viz.memory_figure({str(plan.strategy): plan.memory()}),
    }
    if path is not None:
        target = Path(path)
        for name, figure in figures.items():
            suffix = "" if name == "mesh" else f"-{name}"
            figure.savefig(target.with_stem(target.stem + suffix), dpi=120, bbox_inches="tight")
    return figures
