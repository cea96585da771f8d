"""`MemorySnapshot`: the state in host memory, one copy here and one with the next process.

Written to a memory file system (`/dev/shm`), it survives the death of any process, and, because
process p + 1 keeps the shards of process p too, the loss of one host. It costs a device-to-host
copy and one message to the neighbour but no disk, so it can be taken far more often than a
checkpoint. It knows one layout only: on another mesh or process count, use the checkpoint on disk.
"""

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardtrain.checkpoint import agreement, leaves, ring, steps
from shardtrain.checkpoint.fingerprint import as_text, fingerprint
from shardtrain.checkpoint.protocol import CheckpointPlan
from shardtrain.errors import CheckpointError

_OWN, _PEER = "own", "peer"
_LENGTH = struct.Struct("<Q")
Region = tuple[tuple[int, int], ...]


class MemorySnapshot:
    """The newest few states of a run in memory, with the interface of `Checkpointer`.

    All processes call every method together.

    Args:
        directory: of this run, on a memory file system of each host, e.g. `/dev/shm/my-run`.
        plan: as when saving; another layout finds no snapshot.
        keep: snapshots to keep, at least 2: while one is being written another must be whole.

    Raises:
        CheckpointError: `keep` is too small.
    """

    def __init__(self, directory: str | os.PathLike[str], plan: CheckpointPlan, *, keep: int = 2):
        if keep < 2:
            raise CheckpointError(f"keep must be at least 2, got {keep}: one may be half-written.")
        self.directory = steps.resolve(directory) / f"process-{jax.process_index()}"
        self._abstract = plan.abstract_state
        self._named = leaves.named_leaves(self._abstract)
        self._keep = keep
        self._layout = _layout(self._named)
        self.extra: dict[str, Any] = {}

    def save(self, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Copy this process's shards into memory here and at the next process.

        Args:
            state: as the plan shards it.
            extra: JSON to keep with it; read back as `.extra`.

        Raises:
            CheckpointError: the state is not sharded as the plan says, or some process has no room
                for it. Earlier snapshots are intact.
        """
        named = leaves.named_leaves(state)
        if _layout(named) != self._layout:
            raise CheckpointError("the state does not have the shapes and shardings of the plan.")
        step = int(np.asarray(jax.device_get(state.step)))
        body = b"".join(_blocks(leaves.to_arrays(named)))
        header = {
            "step": step,
            "process": jax.process_index(),
            "layout": self._layout,
            "crc32": zlib.crc32(body),
            "impl": {n: i.impl for n, i in leaves.describe(named).items() if i.is_key},
            "fingerprints": as_text(fingerprint(named)),
            "extra": dict(extra or {}),
        }
        text = json.dumps(header).encode()
        own = _LENGTH.pack(len(text)) + text + body
        failure = self._write(step, _OWN, own)
        if jax.process_count() > 1:
            received = ring.shift(np.frombuffer(own, np.uint8), by=1)
            failure = self._write(step, _PEER, received.tobytes()) or failure
        if agreement.all_agree(failure is None):
            self._forget(step)
            return
        for path in self.directory.glob(f"{step}.*"):
            path.unlink()
        raise CheckpointError(
            f"no snapshot of step {step} in {self.directory.parent}: "
            f"{failure or 'another process has no room for it'}. Earlier snapshots are intact."
        )

    def latest(self) -> int | None:
        """The newest step that every process holds, or can get back from its neighbour."""
        return max(self._whole(), default=None)

    def _whole(self) -> set[int]:
        owns = ring.gather_steps(self._held(_OWN), self._keep)
        peers = ring.gather_steps(self._held(_PEER), self._keep)
        count = len(owns)
        return {
            step
            for step in set().union(*owns, *peers)
            if all(step in owns[p] or step in peers[(p + 1) % count] for p in range(count))
        }

    def restore(self, step: int | None = None) -> Any:
        """The state of a snapshot; a process that lost its shards gets them from the next one.

        Raises:
            CheckpointError: no snapshot of this layout is whole (restore from disk instead), or
                the values are not those that were saved.
        """
        whole = self._whole()
        chosen = max(whole, default=None) if step is None else step
        if chosen is None or chosen not in whole:
            raise CheckpointError(
                f"no whole snapshot of {'this layout' if step is None else f'step {step}'} in "
                f"{self.directory.parent}; restore from disk."
            )
        found = self._read(chosen, _OWN)
        if not agreement.all_agree(found is not None):
            kept = self._read(chosen, _PEER)
            sent = np.frombuffer(b"" if kept is None else kept, np.uint8)
            received = ring.shift(sent, by=-1).tobytes()
            found = received if found is None else found
        assert found is not None  # `_whole` says that somebody has it
        header, body = _split(found)
        self.extra = header["extra"]
        state, marks = self._rebuilt(header, body)
        if not agreement.all_agree(marks == header["fingerprints"]):
            raise CheckpointError(
                f"the snapshot of step {chosen} does not hold the values that were saved; restore "
                "from disk."
            )
        return state

    def _rebuilt(self, header: Mapping[str, Any], body: bytes) -> tuple[Any, dict[str, str]]:
        impls = header["impl"]
        infos = {
            name: leaves.LeafInfo(info.shape, info.dtype, impls.get(name))
            for name, info in leaves.describe(self._named).items()
        }
        arrays, start = {}, 0
        for key, target in leaves.to_targets(self._named, infos).items():
            arrays[key], start = _placed(target, body, start)
        restored = leaves.from_arrays(arrays, self._named, infos)
        marks = as_text(fingerprint(dict(zip(self._named, restored, strict=True))))
        return jax.tree.unflatten(jax.tree.structure(self._abstract), restored), marks

    def _path(self, step: int, kind: str) -> Path:
        return self.directory / f"{step}.{kind}"

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of later steps: they turned out to be wrong."""
        for path in self.directory.glob(f"*.{_OWN}"):
            if int(path.stem) > step:
                path.unlink()
                path.with_suffix(f".{_PEER}").unlink(missing_ok=True)

    def delete(self) -> None:
        """Free the memory: the run has come to its end."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return sorted(self._whole())

    def _write(self, step: int, kind: str, blob: bytes) -> OSError | None:
        """Write, or say why not: the other processes wait for this one."""
        partial = self.directory / f"{step}.{kind}.partial"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(blob)
            os.replace(partial, self._path(step, kind))
        except OSError as error:
            return error
        return None

    def _read(self, step: int, kind: str) -> bytes | None:
        """The blob, if it is whole, of this layout, and of the process it should be of."""
        owner = (jax.process_index() - (kind == _PEER)) % jax.process_count()
        try:
            blob = self._path(step, kind).read_bytes()
            header, body = _split(blob)
            expected = (step, owner, self._layout, zlib.crc32(body))
            actual = tuple(header[k] for k in ("step", "process", "layout", "crc32"))
        except (OSError, ValueError, KeyError, struct.error):  # torn or foreign: as good as absent
            return None
        return blob if actual == expected else None

    def _held(self, kind: str) -> set[int]:
        found = (path.stem for path in self.directory.glob(f"*.{kind}"))
        return {int(s) for s in found if s.isdigit() and self._read(int(s), kind) is not None}

    def _forget(self, newest: int) -> None:
        """Drop all but the newest few, and steps of a future that was rolled back."""
        present = {int(path.stem) for path in self.directory.glob(f"*.{_OWN}")}
        wanted = sorted(step for step in present if step <= newest)[-self._keep :]
        for path in self.directory.iterdir():
            if path.name.split(".")[0] not in {str(step) for step in wanted}:
                path.unlink()


def _split(blob: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = _LENGTH.unpack_from(blob)
    start = _LENGTH.size
    return json.loads(blob[start : start + length]), blob[start + length :]


def _layout(named: Mapping[str, Any]) -> str:
    """A hash of names, shapes, dtypes, shardings and the mesh; equal on all processes."""
    digest = hashlib.sha256(f"{jax.process_count()}".encode())
    for name, leaf in named.items():
        sharding = leaf.sharding
        if not isinstance(sharding, jax.sharding.NamedSharding):
            raise CheckpointError(f"leaf {name} is not on a mesh; snapshots need NamedShardings.")
        sizes = dict(sharding.mesh.shape)
        spec = tuple(sharding.spec) + (None,) * (len(leaf.shape) - len(sharding.spec))
        digest.update(f"{name} {leaf.shape} {leaf.dtype} {spec} {sizes};".encode())
    return digest.hexdigest()[:16]


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _blocks(arrays: Mapping[str, jax.Array]) -> Iterator[bytes]:
    """The distinct shards of this process, in a fixed order."""
    for array in arrays.values():
        shards = {_region(s.index, array.shape): s for s in array.addressable_shards}
        for region in sorted(shards):
            yield np.asarray(shards[region].data).tobytes()


def _placed(target: jax.ShapeDtypeStruct, body: bytes, start: int) -> tuple[jax.Array, int]:
    """One array from its blocks in `body`, and where the next one begins."""
    sharding = target.sharding
    assert sharding is not None
    indices = sharding.addressable_devices_indices_map(target.shape).values()
    blocks: dict[Region, np.ndarray] = {}
    for region in sorted({_region(index, target.shape) for index in indices}):
        shape = tuple(stop - begin for begin, stop in region)
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(body, target.dtype, count, start)
        blocks[region] = flat.reshape(shape)
        start += flat.nbytes
    read = lambda index: blocks[_region(index, target.shape)]
    return jax.make_array_from_callback(target.shape, sharding, read), start
