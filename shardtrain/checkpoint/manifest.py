"""What must be true of a step's files: sizes and checksums, written after the commit.

Orbax notices damage to its own metadata but not to the arrays: most single-bit flips in a data file
load without any error. So each process, after the commit, reads back a share of the files and
writes one part of a manifest; a step counts only when all parts are there. Before any collective
load all files are compared with it, because a process that fails alone leaves the others waiting.
"""

import concurrent.futures
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from shardtrain.checkpoint.header import Header
from shardtrain.errors import CheckpointError

FOLDER = "shardtrain"
_HEADER = "header.json"
_BLOCK = 1 << 22
_READERS = 4


def write_header(step_directory: Path, header: Header) -> None:
    """Write what describes the step; one process does it."""
    _write(step_directory / FOLDER / _HEADER, header.to_json())


def write_part(step_directory: Path, part: int, num_parts: int) -> None:
    """Read back this process's share of the files and record their sizes and checksums."""
    names = _data_files(step_directory)[part::num_parts]
    paths = [step_directory / name for name in names]
    for path in paths:
        _sync(path)
    sums = _checksums(paths)
    files = {
        name: [path.stat().st_size, value]
        for name, path, value in zip(names, paths, sums, strict=True)
    }
    _write(_part_path(step_directory, part, num_parts), {"files": files})


def is_complete(step_directory: Path, num_parts: int | None = None) -> bool:
    """Whether the header and all parts exist (their contents are not read, but for the count)."""
    if num_parts is None:
        try:
            num_parts = read_header(step_directory).num_parts
        except CheckpointError:
            return False
    parts = (_part_path(step_directory, part, num_parts) for part in range(num_parts))
    return (step_directory / FOLDER / _HEADER).is_file() and all(p.is_file() for p in parts)


def read_header(step_directory: Path) -> Header:
    """Read the description of a step.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    return Header.from_json(_read(step_directory / FOLDER / _HEADER))


def problems(step_directory: Path, share: int = 0, num_shares: int = 1) -> list[str]:
    """What is wrong with a step's files; empty when nothing is.

    Sizes of all files are compared, checksums of every `num_shares`-th one from `share`.
    """
    try:
        num_parts = read_header(step_directory).num_parts
        recorded: dict[str, list[int]] = {}
        for part in range(num_parts):
            recorded |= _read(_part_path(step_directory, part, num_parts))["files"]
    except CheckpointError as error:
        return [str(error)]
    if outside := [name for name in recorded if not _is_inside(name)]:
        return [f"the manifest names a file outside of the step: {outside[0]!r}"]
    if links := [name for name in recorded if _passes_a_link(step_directory, name)]:
        return [f"{links[0]} is a symbolic link, or lies behind one"]
    found = [
        problem
        for name, (size, _) in sorted(recorded.items())
        if (problem := _size_problem(step_directory / name, name, size))
    ]
    if found:
        return found
    mine = sorted(recorded)[share::num_shares]
    try:
        sums = _checksums([step_directory / name for name in mine])
    except OSError as error:  # to be told to the other processes, not to fail alone
        return [f"{error.filename or step_directory} cannot be read: {error.strerror}"]
    return [
        f"{name}: checksum {actual:08x}, written {recorded[name][1]:08x}"
        for name, actual in zip(mine, sums, strict=True)
        if actual != recorded[name][1]
    ]


def total_bytes(step_directory: Path) -> int:
    """Bytes of all files of a step."""
    return sum((step_directory / name).stat().st_size for name in _data_files(step_directory))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _passes_a_link(step_directory: Path, name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(
        step_directory.joinpath(*parts[: depth + 1]).is_symlink() for depth in range(len(parts))
    )


def _size_problem(path: Path, name: str, size: int) -> str | None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None if actual == size else f"{name}: {actual} bytes, written {size}"


def _part_path(step_directory: Path, part: int, num_parts: int) -> Path:
    return step_directory / FOLDER / f"files-{part:05d}-of-{num_parts:05d}.json"


def _data_files(step_directory: Path) -> list[str]:
    """All files but the manifest itself, as sorted relative POSIX paths."""
    found = (p.relative_to(step_directory) for p in step_directory.rglob("*") if p.is_file())
    return sorted(p.as_posix() for p in found if p.parts[0] != FOLDER)


def _checksums(paths: Sequence[Path]) -> list[int]:
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_checksum, paths))


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _write(path: Path, body: Mapping[str, Any]) -> None:
    """Write JSON with its own checksum so that it appears whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(body)
    record = json.dumps({"crc32": zlib.crc32(text.encode()), "body": body})
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(record)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        body, written = record["body"], record["crc32"]
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror} (never completed?)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error}") from error
    actual = zlib.crc32(json.dumps(body).encode())
    if actual != written:
        raise CheckpointError(f"{path.name} is damaged: checksum {actual}, written {written}")
    return body


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk, where the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
