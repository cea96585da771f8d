"""Sharded parameters back into files of the names, dtypes and order they came from.

Design: a file begins with the very header of the one it is like, and every number goes where it
was read; so a state that was loaded and not trained gives the same files, byte by byte.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.checkpoint import safetensors
from shardtrain.checkpoint.agreement import on_first
from shardtrain.errors import CheckpointError
from shardtrain.hf.leaves import corrected, in_layout, model_leaves, values_of
from shardtrain.hf.load import rules_for, wanted_values
from shardtrain.hf.mapping import bind, casts, left_out
from shardtrain.hf.pieces import Pieces
from shardtrain.hf.source import Source, open_source
from shardtrain.plan import Plan
from shardtrain.pytree import leaves_by_path
from shardtrain.train import TrainState

_LOG = logging.getLogger("shardtrain.hf")
_COPIED = (".json", ".txt", ".model", ".jinja")
"""Config, index, tokenizer."""


def export_hf(
    plan: Plan,
    state: TrainState,
    directory: str | os.PathLike[str],
    like: str | os.PathLike[str],
    mapping: Mapping[str, Any] | None = None,
) -> Path:
    """Write the parameters as a Hugging Face checkpoint; low-rank corrections are added up.

    The files have the names, dtypes and order of `like`; its config, index and tokenizer are
    copied. Without training in between they are the same, byte by byte. The host needs memory for
    the largest array only; corrections need room on the devices for the sums.

    Args:
      plan: The plan of the state.
      state: Not donated.
      directory: Written; other than `like`.
      like: The checkpoint that was loaded.
      mapping: As in `load_hf`.

    Returns:
      The absolute path of the directory.

    Raises:
      CheckpointError: `like` does not fit the model, or is the directory to write.
    """
    plan._check_alive(state)
    source, target = open_source(like), Path(directory).expanduser().absolute()
    if target.exists() and target.samefile(source.directory):
        raise CheckpointError(f"{target} is the checkpoint it is to be like: write elsewhere")
    rules = rules_for(source, plan, mapping)
    writes = jax.process_index() == 0
    found = casts(bind(rules, source.tensors, wanted_values(plan)), wanted_values(plan))
    _say_casts(target, found if writes else {})
    on_first(lambda: _begin(source, target))
    opened = _begun(source, target) if writes else source
    places = _places(plan, bind(rules, opened.tensors, wanted_values(plan)))
    state = plan._agreed(state)
    values = values_of(state) | _sums(plan, state)
    for path, pieces in places.items():
        _write(values[path], pieces if writes else [])
        opened.release()
    if writes:
        for name in left_out(rules, source.tensors):
            opened.tensors[name][...] = source.tensors[name]
    on_first(lambda: _finish(opened))
    return target


def _say_casts(target: Path, found: Mapping[tuple[Any, Any], list[str]]) -> None:
    for (have, want), paths in found.items():
        exact = jnp.promote_types(have, want) == have
        how = "exact" if exact else "exact unless trained: then rounded"
        _LOG.warning("%s: %d parameters %s -> %s (%s)", target.name, len(paths), want, have, how)


def _begin(source: Source, target: Path) -> None:
    """Files with the headers of the source and no numbers yet."""
    target.mkdir(parents=True, exist_ok=True)
    stale = {p.name for p in target.glob("*.safetensors")} - {f.path.name for f in source.files}
    if stale:
        raise CheckpointError(
            f"{target} already has {', '.join(sorted(stale))}, of another checkpoint, and "
            "readers would take both. Write to an empty directory"
        )
    for file in source.files:
        with _partial(target / file.path.name).open("wb") as out:
            out.write(file.memory[: file.header_bytes])
            out.truncate(len(file.memory))
            if hasattr(os, "posix_fallocate"):  # or a full disk is a crash when pages are written
                os.posix_fallocate(out.fileno(), 0, len(file.memory))
    for file in source.directory.iterdir():
        if file.suffix in _COPIED and file.is_file():
            shutil.copyfile(file, target / file.name)


def _begun(source: Source, target: Path) -> Source:
    names = [_partial(target / file.path.name) for file in source.files]
    return Source(target, tuple(safetensors.map_file(name, writable=True) for name in names))


def _finish(opened: Source) -> None:
    for file in opened.files:
        file.memory.flush()
        os.replace(file.path, file.path.with_suffix(""))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _places(plan: Plan, bound: Mapping[str, list[Pieces]]) -> dict[str, list[Pieces]]:
    """Where each array goes: by path in the plan's state; sums by the path of the parameter."""
    where, summed = model_leaves(plan), corrected(plan)
    kept = {path: each for path, each in bound.items() if path not in summed}
    first = in_layout(plan, {where[path]: each[0] for path, each in kept.items()})
    again = in_layout(plan, {where[path]: each[1] for path, each in kept.items() if each[1:]})
    places = {path: [pieces] for path, pieces in first.items()}
    for path, pieces in again.items():
        places[path].append(pieces)
    return places | {path: bound[path] for path in bound if path in summed}


def _sums(plan: Plan, state: TrainState) -> dict[str, jax.Array]:
    """Parameter path -> weight and its low-rank correction, added up."""
    paths, where = sorted(corrected(plan)), model_leaves(plan)
    if not paths:
        return {}
    planned = values_of(plan.abstract_checkpoint)

    def add_up(params: Any, variables: Any) -> dict[str, jax.Array]:
        model = plan.form.rebuild(params, variables)
        values = model[1] if isinstance(model, tuple) else model  # Linen: (module, variables)
        whole = leaves_by_path(plan._parts_of(values)[0])
        return {path: whole[path] for path in paths}

    shardings = {path: planned[where[path]].sharding for path in paths}
    return jax.jit(add_up, out_shardings=shardings)(state.params, state.variables)


def _write(array: jax.Array, places: list[Pieces]) -> None:
    """Each shard into its place; with several processes process 0 gets the array first."""
    if not array.is_fully_addressable:
        sharding: Any = array.sharding
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=whole)(array)
    for shard in array.addressable_shards[: 1 if array.is_fully_replicated else None]:
        if array.is_fully_replicated or shard.replica_id == 0:
            for pieces in places:
                pieces.write(shard.index, np.asarray(shard.data))
