"""What the compiler says of a step: memory, operations, communication."""

import html
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from rich.console import Group
from rich.table import Table
from rich.text import Text

from shardtrain.errors import OutOfMemoryError
from shardtrain.planner.collectives import Collective, collectives_in, device_assignment
from shardtrain.planner.flops import count_flops
from shardtrain.planner.hlo import Module, parse_hlo
from shardtrain.planner.lints import Lint, lint_collectives
from shardtrain.planner.temporaries import Buffer, temporaries_at_peak
from shardtrain.planner.traffic import axes_text, collectives_table, format_bytes, total_bytes
from shardtrain.xla_options import Options, Value, renamed, xla_option_error


@dataclass(frozen=True)
class Compiled:
    """A compiled step on one device. A number the backend does not give is None, never 0.

    Attributes:
        argument_bytes: all arguments (state and batch) on one device.
        temp_bytes: scratch: activations, gradients, buffers of collectives.
        output_bytes: results, those that reuse an argument's memory included.
        alias_bytes: results that reuse a donated argument's memory.
        peak_bytes: most in use at once, as the compiler's own buffer assignment has it; None where
            it does not say, as on CPU. `total_bytes` bounds it from above.
        flops: of dots and convolutions in one step, loops multiplied out (`cost_analysis` counts a
            loop's body once); two per multiply-add, elementwise work left out.
        collectives: one row per distinct collective.
        hlo: the optimised program as text.
        seconds: wall time of the compilation.
        platform: `cpu`, `gpu` or `tpu`.
        device_kind: for example `TPU v5 lite`.
        note: what this compilation is and is not (a proxy, without autotuning, ...).
        arguments: (path, bytes on one device) of every argument, largest first.
        temporaries: the largest temporary arrays at the fullest moment, as followed through the
            program; see `temporaries_at_peak`.
        uncounted: custom kernels whose operations are missing from `flops`.
        is_exact: False when a data-dependent loop or a conditional was counted as one pass.
    """

    argument_bytes: int | None
    temp_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    peak_bytes: int | None
    flops: int
    collectives: tuple[Collective, ...]
    hlo: str = field(repr=False)
    seconds: float
    platform: str
    device_kind: str = ""
    note: str = ""
    arguments: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    temporaries: tuple[Buffer, ...] = field(default=(), repr=False)
    uncounted: tuple[str, ...] = ()
    is_exact: bool = True

    @property
    def total_bytes(self) -> int | None:
        """Arguments + temporaries + outputs not in place: what is needed if nothing is shared."""
        parts = (self.argument_bytes, self.temp_bytes, self.output_bytes, self.alias_bytes)
        if None in parts:
            return None
        argument, temp, output, alias = (part or 0 for part in parts)
        return argument + temp + output - alias

    def lints(
        self,
        expected_axes: Iterable[str] | None = None,
        expected_gathers: Iterable[str] | None = None,
    ) -> list[Lint]:
        """Communication that probably should not be there; see `lint_collectives`."""
        return lint_collectives(
            self.collectives, expected_axes=expected_axes, expected_gathers=expected_gathers
        )

    def rows(self) -> list[tuple[str, str]]:
        """(quantity, value) pairs as printed."""
        flops = f"{self.flops / 1e9:,.3f} GFLOP{'' if self.is_exact else ' (≈ depends on data)'}"
        if self.uncounted:
            flops += f", without {', '.join(self.uncounted)}"
        return [
            ("arguments", _size(self.argument_bytes)),
            ("temporaries", _size(self.temp_bytes)),
            ("outputs", f"{_size(self.output_bytes)} ({_size(self.alias_bytes)} in place)"),
            ("peak", _size(self.peak_bytes)),
            ("operations", flops),
            ("communication", format_bytes(total_bytes(self.collectives)) + " per step"),
            ("compiled in", f"{self.seconds:.1f} s for {self.device_kind or self.platform}"),
        ]

    def __rich__(self) -> Group:
        table = Table("", "one device", title="Compiled step")
        for name, value in self.rows():
            table.add_row(name, value)
        owners = Table("largest", "bytes", title="Memory by owner")
        for path, size in self.arguments[:8]:
            owners.add_row(path, format_bytes(size))
        owners.add_section()
        for buffer in self.temporaries[:8]:
            owners.add_row(str(buffer), format_bytes(buffer.bytes))
        parts = [table, *([owners] if self.arguments else []), collectives_table(self.collectives)]
        return Group(*parts, Text(self.note)) if self.note else Group(*parts)

    def _repr_html_(self) -> str:
        rows = [("", "kind", "axes", "bytes", "per step", "source")]
        for c in sorted(self.collectives, key=lambda c: -c.bytes * c.count):
            times = f"{'' if c.is_exact else '≈'}{c.count}"
            where = c.parameter or c.source
            rows.append(("", c.kind, axes_text(c), format_bytes(c.bytes), times, where))
        owners = [[path, format_bytes(size)] for path, size in self.arguments[:8]]
        owners += [[str(buffer), format_bytes(buffer.bytes)] for buffer in self.temporaries[:8]]
        return (
            _html_table("Compiled step, one device", [list(row) for row in self.rows()])
            + _html_table("Memory by owner", owners)
            + _html_table("Communication", [list(row[1:]) for row in rows])
            + (f"<p>{html.escape(self.note)}</p>" if self.note else "")
        )


def _size(value: int | None) -> str:
    return "not given by this backend" if value is None else format_bytes(value)


def _html_table(caption: str, rows: list[list[str]]) -> str:
    body = "".join(
        "<tr>"
        + "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><caption>{html.escape(caption)}</caption>{body}</table>"


def argument_bytes_by_path(module: Module) -> list[tuple[str, int]]:
    """(path, bytes on one device) of a program's arguments, largest first."""
    parameters = module.computations[module.entry].parameters
    found = [
        (node.operation_name or f"argument {number}", sum(a.bytes for a in node.arrays))
        for number, node in sorted(parameters.items())
    ]
    return sorted(found, key=lambda item: -item[1])


def _field(memory: Any, name: str) -> int | None:
    """A figure of `memory_analysis()`, which may be None as a whole or lack the field."""
    value = getattr(memory, name, None)
    return None if value is None or value < 0 else int(value)


def read_compiled(
    compiled: jax.stages.Compiled, mesh: Mesh, seconds: float = 0.0, note: str = ""
) -> Compiled:
    """Read what the compiler decided.

    Args:
        compiled: `jax.jit(f).lower(...).compile()`.
        mesh: names for its devices.
        seconds: what compiling took.
        note: kept with the result.

    Raises:
        ValueError: the program runs on other devices than the mesh's, or gives no text.
    """
    text = compiled.as_text()
    if not text:
        raise ValueError("the backend gives no HLO text for this program")
    module = parse_hlo(text)
    ids = np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)
    flops = count_flops(module)
    memory = compiled.memory_analysis()
    device = mesh.devices.flat[0]
    peak = _field(memory, "peak_memory_in_bytes")
    return Compiled(
        argument_bytes=_field(memory, "argument_size_in_bytes"),
        temp_bytes=_field(memory, "temp_size_in_bytes"),
        output_bytes=_field(memory, "output_size_in_bytes"),
        alias_bytes=_field(memory, "alias_size_in_bytes"),
        # The CPU backend's figure leaves out temporaries; 0 is a backend that does not track it.
        peak_bytes=peak or None if device.platform != "cpu" else None,
        flops=flops.total,
        collectives=tuple(
            collectives_in(module, mesh.axis_names, ids, device_assignment(compiled))
        ),
        hlo=text,
        seconds=seconds,
        platform=device.platform,
        device_kind=device.device_kind,
        note=note,
        arguments=tuple(argument_bytes_by_path(module)),
        temporaries=temporaries_at_peak(module)[1],
        uncounted=flops.uncounted,
        is_exact=flops.is_exact,
    )


def compile_lowered(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    note: str = "",
    options: Mapping[str, Value] | None = None,
) -> Compiled:
    """Compile a lowered program and read it.

    Args:
        lowered: `jax.jit(f).lower(...)` for the mesh's devices, real or of a `Target`.
        mesh: names for its devices.
        note: kept with the result (`Target.note`).
        options: flags of the compiler for this program; see `shardtrain.xla_options`.

    Raises:
        OutOfMemoryError: the compiler found that the program does not fit the device's memory.
        XlaOptionError: the compiler does not know one of the options.
    """
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # Without a device what the persistent cache holds cannot be loaded; it is compiled.
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
            compiled, _ = compile_with(lowered, dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(str(error), mesh.devices.flat[0].device_kind) from error
    return read_compiled(compiled, mesh, time.perf_counter() - start, note)


def compile_with(lowered: jax.stages.Lowered, options: Options) -> tuple[Any, Options]:
    """Compile with options; those a newer compiler calls otherwise are passed by that name.

    Returns:
        The compiled program, and the options as they were accepted.

    Raises:
        XlaOptionError: the compiler does not know one of them, or not with that value.
    """
    try:
        return lowered.compile(compiler_options=options or None), options
    except jax.errors.JaxRuntimeError as error:
        newer = renamed(str(error), options)
        if newer is None:
            refused = xla_option_error(str(error), options)
            if refused is None:
                raise
            raise refused from error
    return compile_with(lowered, newer)


def accepted_options(options: Options, device: jax.Device) -> Options:
    """Ask a device's compiler whether it knows these options, with a program of one addition.

    Raises:
        XlaOptionError: it does not know one of them, or not with that value.
    """
    if not options:
        return options
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    return compile_with(jax.jit(lambda x: x + 1).lower(number), options)[1]


def out_of_memory(message: str, device_kind: str) -> OutOfMemoryError:
    """XLA's report that a program does not fit, with the figures it contains."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [float(n) * units[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)([KMGT])i?B?\b", message)]
    figures = ""
    if len(sizes) >= 2:
        figures = f": needs {format_bytes(sizes[0])}, has {format_bytes(sizes[1])}"
    return OutOfMemoryError(
        f"the step does not fit one {device_kind}{figures}. Shard more (fsdp, tensor), use "
        f"remat='full', more microbatches, or offload. The compiler said: {message.splitlines()[0]}"
    )
