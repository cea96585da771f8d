"""What `shardtrain train` prints before and after the run."""

import re
import textwrap
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from shardtrain.monitoring.console import count_text, duration
from shardtrain.partitioning.rules import BATCH_AXES, as_axes
from shardtrain.plan import Plan
from shardtrain.plan.explain import device_bytes, shards
from shardtrain.tables import bytes_text
from shardtrain.viz.text import memory_text, mesh_text

_LABEL = 9


def print_start(console: Console, plan: Plan, lines: Mapping[str, str]) -> None:
    """The summary before the first step.

    Args:
      console: Where to.
      plan: What will be trained.
      lines: Further label -> text pairs, shown first.
    """
    for label, text in lines.items():
        _item(console, label, text)
    _item(console, "strategy", str(plan.strategy))
    _item(console, "compiler", plan.xla_text())
    _item(console, "mesh", mesh_text(plan.mesh))
    sizes = [leaf.size for leaf in jax.tree.leaves(plan.layout.batch)]
    _item(console, "batch", f"{batch_arithmetic(plan)}; {max(sizes):,} tokens per step")
    memory = plan.memory()
    parts = ("params", "grads", "optimizer", "activations", "batch")
    held = {name: getattr(memory, name) for name in parts}
    total = f"total {bytes_text(memory.total)} (activations are an estimate)"
    _item(
        console, "memory", f"on each device\n{memory_text(held, _limit(plan), width=24)}\n{total}"
    )
    _item(console, "params", "what each device holds")
    console.print(parameter_table(plan))
    for finding in plan.findings:
        _item(console, "note", finding)


def batch_arithmetic(plan: Plan) -> str:
    """`global batch 32 = data 2 x fsdp 2 x microbatches 1 x 8 rows`."""
    rows = max(leaf.shape[0] for leaf in jax.tree.leaves(plan.layout.batch) if leaf.shape)
    axes = [a for a in BATCH_AXES if a != "expert" or plan.layout.sizes[a] > 1]
    parts = 1
    for axis in axes:
        parts *= plan.layout.sizes[axis]
    micro = plan.strategy.num_microbatches
    split = " x ".join(f"{a} {plan.layout.sizes[a]}" for a in axes)
    return f"global batch {rows} = {split} x microbatches {micro} x {rows // parts // micro} rows"


def parameter_table(plan: Plan) -> Table:
    """One row per kind of parameter: repeated layers are one row with their number."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    zero3 = plan.strategy.zero == 3
    for leaf in plan.layout.params.values():
        key = (re.sub(r"\d+", "*", leaf.path), leaf.shape, leaf.spec(zero3))
        groups.setdefault(key, []).append(leaf)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for name, justify in (
        ("parameter", "left"),
        ("shape", "left"),
        ("split over", "left"),
        ("per device", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (path, shape, spec), leaves in groups.items():
        held = sum(leaf.nbytes for leaf in leaves) // shards(spec, plan.layout.sizes)
        times = f" x{len(leaves)}" if len(leaves) > 1 else ""
        split = split_text(spec, len(shape))
        table.add_row(path, "x".join(map(str, shape)) + times, split, bytes_text(held))
    params = plan.layout.state.params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    table.add_row("", "", f"{count_text(count)} parameters", bytes_text(device_bytes(params)))
    return table


def split_text(spec: Any, rank: int) -> str:
    """A spec, one entry per dim: `fsdp, tensor, -`; or `whole`.

    Example:
      >>> split_text(jax.sharding.PartitionSpec(None, "tensor"), 3)
      '-, tensor, -'
    """
    entries = [as_axes(entry) for entry in spec]
    entries += [()] * (rank - len(entries))
    if not any(entries):
        return "whole"
    return ", ".join("+".join(entry) or "-" for entry in entries)


def print_sample(console: Console, prompt: str, sample: str) -> None:
    """The prompt and what the model made of it."""
    for title, text in (("prompt", prompt), ("what the model makes of it", sample)):
        console.rule(f"[bold]{title}", align="left", style="dim")
        console.print(RichText(_printable(text)))
    console.rule(style="dim")


def closing_paragraph(facts: Mapping[str, Any]) -> str:
    """The run in one paragraph.

    Args:
      facts: `parameters`, `steps`, `tokens`, `seconds`, `devices`, `before`, `after` (nats per
        byte on held-out text, `before` may be None), `directory`, `step`, `last_step`.
    """
    fell = "" if facts["before"] is None else f"fell from {facts['before']:.2f} to"
    was = fell or "is"
    spent = (
        f"Trained {facts['steps']} steps ({count_text(facts['tokens'])} tokens) in "
        f"{duration(facts['seconds'])}"
        if facts["steps"]
        else "Nothing was left to train"
    )
    return (
        f"{spent}: a decoder of {count_text(facts['parameters'])} parameters on "
        f"{facts['devices']}. Held-out loss {was} {facts['after']:.2f} nats per byte. "
        f"{facts['directory']} holds the checkpoint of step {facts['step']}, the metrics "
        "(metrics.jsonl), the loss curve (loss.png) and the sample (sample.txt). The same command "
        f"with --steps {2 * facts['last_step']} would go on from here."
    )


def print_paragraph(console: Console, text: str) -> None:
    """Wrapped to the terminal, at most 100 columns."""
    width = min(console.width, 100)
    console.print(
        "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)), markup=False, highlight=False
    )


def _item(console: Console, label: str, text: str) -> None:
    width = max(console.width - _LABEL - 1, 20)
    # Drawings keep their lines; sentences wrap behind the label.
    lines = [p for line in text.splitlines() for p in _wrapped(line, width)]
    body = ("\n" + " " * (_LABEL + 1)).join(lines)
    console.print(
        RichText(f"{label:<{_LABEL}} ", style="bold cyan").append(body, style="not bold default")
    )


def _wrapped(line: str, width: int) -> list[str]:
    return [line] if len(line) <= width else textwrap.wrap(line, width, break_on_hyphens=False)


def _limit(plan: Plan) -> float | None:
    """Memory of one device, where it says so (CPU devices share the host's)."""
    device = plan.mesh.devices.flat[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (stats or {}).get("bytes_limit")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
