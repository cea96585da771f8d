"""Reading checkpoints anywhere: no model code, no mesh, no particular number of devices."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from shardtrain.checkpoint import leaves, manifest, safetensors, steps, store
from shardtrain.checkpoint.describe import describe_mesh, human_bytes
from shardtrain.checkpoint.fingerprint import as_text, fingerprint
from shardtrain.checkpoint.header import Header
from shardtrain.errors import CheckpointError, suggest
from shardtrain.pytree import nested


def restore(
    path: str | os.PathLike[str], step: int | None = None, only: str | None = None
) -> dict[str, Any]:
    """A checkpoint as nested dicts of numpy arrays.

    Args:
        path: a run directory (its newest complete step is read), one step of it, or a
            `.safetensors` file, also of other makers.
        step: another step of the run.
        only: a name or the beginning of names, e.g. `"params"` or `"params/encoder"`.

    Returns:
        Dicts by path component. Typed PRNG keys come as their uint32 words.

    Raises:
        CheckpointError: nothing there, or it is damaged (a wrong value is never returned).
    """
    if safetensors.is_file(steps.resolve(path)):
        found = safetensors.load(steps.resolve(path))
        chosen = {n: found[n] for n in matching(list(found), only, str(path))}
        return nested(chosen, leaves.unescape)
    directory = verified_step(path, step)
    header = manifest.read_header(directory)
    flat = dict(read_leaves(directory, header, select(header, only)))
    return nested(flat, leaves.unescape)


def verified_step(path: str | os.PathLike[str], step: int | None = None) -> Path:
    """The directory of a complete step whose files match their checksums.

    Raises:
        CheckpointError: it is absent or damaged; names the first files.
    """
    root, found = steps.locate(path)
    if step is not None and step not in found:
        raise CheckpointError(f"no complete step {step} in {root}; there are {found}.")
    directory = steps.step_path(root, found[-1] if step is None else step)
    if wrong := manifest.problems(directory):
        others = [s for s in found if s != int(directory.name)]
        raise CheckpointError(
            f"{directory} is damaged: {'; '.join(wrong[:3])}. Other complete steps: {others}."
        )
    return directory


def select(header: Header, only: str | None) -> list[str]:
    """Names equal to `only` or below it; all for None."""
    return matching(list(header.leaves), only, f"step {header.step}")


def matching(names: list[str], only: str | None, where: str) -> list[str]:
    """Those of `names` equal to `only` or below it; all for None."""
    if only is None:
        return names
    prefix = only.strip("/")
    found = [n for n in names if n == prefix or n.startswith(prefix + "/")]
    if not found:
        top = {name.split("/")[0] for name in names}
        raise CheckpointError(f"nothing called {only!r} in {where}; {suggest(only, top)}")
    return found


def read_leaves(
    directory: Path, header: Header, names: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Read leaves one by one, each compared with its fingerprint: host memory of one leaf."""
    for name in names:
        value = _read(directory, name, header.leaves[name])
        saved = header.fingerprints[name]
        now = as_text(fingerprint({name: value}))[name]
        if now != saved:
            raise CheckpointError(
                f"{directory}: the values of {name} changed since they were saved "
                f"(fingerprint {now}, saved {saved})."
            )
        yield name, value


def _read(directory: Path, name: str, info: leaves.LeafInfo) -> np.ndarray:
    shape, dtype = info.shape, info.dtype
    if info.is_key:
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=info.impl)))
        shape, dtype = (*shape, *words.shape), "uint32"
    target = np.empty(shape, jax.numpy.dtype(dtype))
    if not info.size:
        return target
    key = leaves.storage_key(name)
    return store.load(directory, {key: target})[key]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint, without reading its arrays.

    Attributes:
        directory: of the step described.
        steps: all complete steps of the run.
        header: leaves, plan, mesh, extra and versions of this step.
        file_bytes: size of the step on disk.
        problems: what is wrong with its files; empty when all checksums match.
    """

    directory: Path
    steps: list[int]
    header: Header
    file_bytes: int
    problems: list[str]

    @property
    def step(self) -> int:
        """The training step."""
        return self.header.step

    @property
    def leaves(self) -> dict[str, leaves.LeafInfo]:
        """Name → shape, dtype, bytes."""
        return self.header.leaves

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(info.nbytes for info in self.leaves.values())

    def __str__(self) -> str:
        state = "intact" if not self.problems else f"DAMAGED: {self.problems[0]}"
        plan = ", ".join(f"{key}={value}" for key, value in self.header.plan.items())
        return (
            f"{self.directory}: step {self.step} of {self.steps}, {len(self.leaves)} leaves, "
            f"{human_bytes(self.nbytes)}, saved on {describe_mesh(self.header.mesh)} ({plan}); "
            f"{state}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("leaf", "shape", "dtype", "bytes", title=str(self), title_justify="left")
        for name, info in self.leaves.items():
            shape = "×".join(map(str, info.shape)) or "scalar"
            table.add_row(name, shape, info.dtype, human_bytes(info.nbytes))
        yield table


def inspect(path: str | os.PathLike[str], step: int | None = None) -> Inspection:
    """Describe a checkpoint; also says whether its files are intact.

    Args:
        path: a run directory or one step of it.
        step: of a run directory; default the newest complete one.
    """
    root, found = steps.locate(path)
    chosen = found[-1] if step is None else step
    if chosen not in found:
        raise CheckpointError(f"no complete step {step} in {root}; there are {found}.")
    directory = steps.step_path(root, chosen)
    return Inspection(
        directory=directory,
        steps=steps.committed(root),
        header=manifest.read_header(directory),
        file_bytes=manifest.total_bytes(directory),
        problems=manifest.problems(directory),
    )
