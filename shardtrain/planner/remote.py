"""Compile in a process of its own: for other devices, in other numbers, than this process has.

The step is exported here (`jax.export`, over the devices of an abstract mesh), handed to a child
with the right number of CPU devices or with the TPU or GPU compiler, compiled and read there. A
compiler that aborts, or that holds a lock, does so in the child. They exchange files: the exported
program in JAX's own format, and JSON.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.export
from jax.sharding import AxisType, Mesh

from shardtrain.errors import (
    HardwareError,
    KernelNeedsDevicesError,
    OutOfMemoryError,
    XlaOptionError,
)
from shardtrain.hardware import Hardware, hardware
from shardtrain.mesh.build import device_grid
from shardtrain.planner.collective import Collective
from shardtrain.planner.compiled import Compiled, compile_lowered
from shardtrain.planner.targets import compiler_for, target_devices
from shardtrain.planner.temporaries import Buffer
from shardtrain.xla_options import Value

_CUSTOM_CALL = re.compile(r'custom_call\s*@"?([\w.$\-]+)|call_target_name = "([^"]+)"')


@dataclass(frozen=True)
class Request:
    """What the child is given.

    Attributes:
        exported: the step over flat leaves.
        names: path of each leaf.
        donated: whether each leaf's memory may be reused.
        axes: (mesh axis, size) pairs.
        dcn: (mesh axis, size across slices or hosts) pairs.
        hardware: as in `shardtrain.hardware`.
        options: flags of the compiler for this program.
    """

    exported: jax.export.Exported
    names: tuple[str, ...]
    donated: tuple[bool, ...]
    axes: tuple[tuple[str, int], ...]
    dcn: tuple[tuple[str, int], ...]
    hardware: str
    options: Mapping[str, Value] = field(default_factory=dict)


def leaf_names(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, ...]:
    """Paths of the leaves of arguments, as JAX names them in HLO: `state.params['w']`."""
    parameters = list(inspect.signature(function).parameters)
    return tuple(
        parameters[path[0].idx] + jax.tree_util.keystr(path[1:])
        for path, _ in jax.tree_util.tree_leaves_with_path(args)
    )


def export_step(function: Any, args: tuple[Any, ...], platform: str) -> jax.export.Exported:
    """Export a jitted function over its flattened arguments.

    Args:
        function: a `jax.jit` function.
        args: positional arguments; arrays or `jax.ShapeDtypeStruct` with shardings.
        platform: `cpu`, `tpu` or `cuda`.

    Raises:
        KernelNeedsDevicesError: a kernel (cuDNN's attention) that JAX lowers only for devices.
    """
    leaves, tree = jax.tree.flatten(args)

    def flat(*leaves: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    export = jax.export.export
    try:
        return export(jax.jit(flat), platforms=(platform,))(*leaves)
    except ValueError as error:
        if "require devices to be present" in str(error):
            raise KernelNeedsDevicesError(f"the step cannot be exported: {error}") from error
        # Kernels without a promise of stability: harmless between two processes of one version.
        names = {a or b for a, b in _CUSTOM_CALL.findall(str(error))}
        if "compatibility guarantees" not in str(error) or not names:
            raise
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
        return export(jax.jit(flat), platforms=(platform,), disabled_checks=checks)(*leaves)


def compile_elsewhere(
    function: Any,
    args: tuple[Any, ...],
    axes: Mapping[str, int],
    spec: str | Hardware,
    *,
    dcn: Mapping[str, int] | None = None,
    options: Mapping[str, Value] | None = None,
    timeout: float = 1800.0,
) -> Compiled:
    """Compile a step for hardware that is not here, in a child process.

    Args:
        function: a `jax.jit` function, jitted over an abstract mesh or over devices that are here.
        args: positional arguments, abstract, with shardings over that mesh.
        axes: sizes of the mesh axes by name, in the mesh's order.
        spec: hardware string, `"v5e:4x4"`; CPU devices stand in where its compiler is missing.
        dcn: parts of the axes that go across slices or hosts.
        options: flags of the compiler for this program; see `shardtrain.xla_options`.
        timeout: seconds after which the child is ended.

    Raises:
        ValueError: an argument has no sharding, so it is not known where it would live.
        OutOfMemoryError: the compiler found that the step does not fit one device.
        XlaOptionError: the compiler does not know one of the options.
        HardwareError: the mesh has another number of devices; the child took too long or failed
            (the end of what it wrote is quoted).
    """
    asked = hardware(spec)
    if math.prod(axes.values()) != asked.device_count:
        shown = ", ".join(f"{name}={size}" for name, size in axes.items())
        raise HardwareError(f"{asked} has {asked.device_count} devices, the mesh is {shown}")
    names = leaf_names(function, args)
    for name, leaf in zip(names, jax.tree.leaves(args), strict=True):
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(
                f"argument {name} has no sharding; give jax.ShapeDtypeStruct(..., sharding=...)"
            )
    info = jax.tree.leaves(function.trace(*args).args_info)
    platform, _ = compiler_for(asked)
    exported = export_step(function, args, "cuda" if platform == "gpu" else platform)
    request = Request(
        exported=exported,
        names=names,
        donated=tuple(leaf.donated for leaf in info),
        axes=tuple(axes.items()),
        dcn=tuple((dcn or {}).items()),
        hardware=str(asked),
        options=dict(options or {}),
    )
    with tempfile.TemporaryDirectory(prefix="shardtrain-compile-") as directory:
        write_request(Path(directory), request)
        _run_child(directory, asked, timeout)
        result = read_result(Path(directory))
    return named_arguments(result, request)


def _run_child(directory: str, asked: Hardware, timeout: float) -> None:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",  # no device is opened; topologies need none
        "JAX_NUM_CPU_DEVICES": str(asked.device_count),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "shardtrain.planner.remote", directory]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise HardwareError(f"compiling for {asked} took longer than {timeout:.0f} s") from error
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        for kind in (OutOfMemoryError, XlaOptionError):
            if kind.__name__ in done.stderr:
                raise kind(tail.partition(f"{kind.__name__}: ")[2] or tail)
        raise HardwareError(
            f"compiling for {asked} failed in a child process (status {done.returncode}):\n{tail}"
        )


def named_arguments(result: Compiled, request: Request) -> Compiled:
    """The child's result with the user's argument paths in place of the flat ones."""
    flat = {_flat_name(n, d): request.names[n] for n, d in enumerate(request.donated)}

    def rename(text: str) -> str:
        return " + ".join(flat.get(part, part) for part in text.split(" + "))

    return dataclasses.replace(
        result,
        arguments=tuple((rename(name), size) for name, size in result.arguments),
        collectives=tuple(
            dataclasses.replace(c, parameter=rename(c.parameter)) for c in result.collectives
        ),
    )


def _flat_name(number: int, donated: bool) -> str:
    return f"{'donated' if donated else 'kept'}['{number:06d}']"


def compile_request(request: Request) -> Compiled:
    """The child's work: compile an exported step for devices that may not be here."""
    target = target_devices(request.hardware)
    if not target.devices:
        raise HardwareError(f"{request.hardware}: {target.note}")
    sizes = dict(request.axes)
    grid = device_grid(sizes, dict(request.dcn), target.devices)
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    shardings = request.exported.in_shardings_jax(mesh)
    arguments: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for n, (aval, sharding) in enumerate(zip(request.exported.in_avals, shardings, strict=True)):
        leaf = jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        arguments[request.donated[n]][f"{n:06d}"] = leaf

    def step(donated: dict[str, Any], kept: dict[str, Any]) -> Any:
        leaves = {**donated, **kept}
        return request.exported.call(*(leaves[key] for key in sorted(leaves)))

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(arguments[True], arguments[False])
    result = compile_lowered(lowered, mesh, target.note, request.options)
    return dataclasses.replace(result, seconds=time.perf_counter() - start)


def write_request(directory: Path, request: Request) -> None:
    """Put a request into two files."""
    plain = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    exported = plain.pop("exported")
    (directory / "program").write_bytes(exported.serialize())
    (directory / "request.json").write_text(json.dumps(plain))


def read_request(directory: Path) -> Request:
    """The inverse of `write_request`."""
    plain: dict[str, Any] = json.loads((directory / "request.json").read_text())
    for name in ("axes", "dcn"):
        plain[name] = tuple((axis, size) for axis, size in plain[name])
    plain |= {name: tuple(plain[name]) for name in ("names", "donated")}
    program = jax.export.deserialize(bytearray((directory / "program").read_bytes()))
    return Request(exported=program, **plain)


def write_result(directory: Path, result: Compiled) -> None:
    """What was compiled, as JSON."""
    (directory / "result.json").write_text(json.dumps(dataclasses.asdict(result)))


def read_result(directory: Path) -> Compiled:
    """The inverse of `write_result`."""
    plain: dict[str, Any] = json.loads((directory / "result.json").read_text())
    for row in plain["collectives"]:
        row |= {"axes": tuple(row["axes"]), "within": tuple(row["within"])}
    plain["collectives"] = tuple(Collective(**row) for row in plain["collectives"])
    plain["temporaries"] = tuple(Buffer(**buffer) for buffer in plain["temporaries"])
    plain["arguments"] = tuple((name, size) for name, size in plain["arguments"])
    plain["uncounted"] = tuple(plain["uncounted"])
    return Compiled(**plain)


def main(directory: str) -> None:
    """Entry of the child: read the request, write the result."""
    write_result(Path(directory), compile_request(read_request(Path(directory))))


if __name__ == "__main__":
    main(sys.argv[1])
