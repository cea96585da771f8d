"""Text to train on: the standard library of the running Python, or the user's files."""

import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shardtrain.errors import DataError

_EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
)


def stdlib_text(directory: str | Path | None = None) -> bytes:
    """The source of Python's standard library, about 10 MB of real text on every machine.

    Args:
        directory: where the library lies; default that of the running interpreter.

    Returns:
        UTF-8 bytes of all `.py` files in path order, without tests, idlelib and installed packages.

    Raises:
        DataError: there are no readable files (some embedded builds ship bytecode only).
    """
    root = Path(directory or sysconfig.get_paths()["stdlib"])
    parts = []
    for path in sorted(_python_files(root), key=lambda p: p.parts):
        try:
            parts.append(path.read_bytes())
        except OSError:  # one unreadable file of a thousand does not matter; none at all does
            continue
    text = b"\n".join(part for part in parts if part.strip())
    if not text:
        raise DataError(
            f"no readable .py files under {root}, where this Python keeps its standard library. "
            "Pass your own text instead (a file, a directory or .jsonl)."
        )
    return text


def _python_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _EXCLUDED]
        yield from (Path(directory) / name for name in files if name.endswith(".py"))


def read_text(path: str | Path) -> bytes:
    """The text of a file, of all files of a directory (in path order), or of a `.jsonl`.

    Args:
        path: a UTF-8 file; a directory, whose hidden files are left out; or JSON lines with a
            `"text"` field each.

    Returns:
        UTF-8 bytes, documents separated by a newline.

    Raises:
        DataError: missing, unreadable, not UTF-8 (names file and byte), no `"text"` field (names
            the line), or nothing in it.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"no such file or directory: {root} (from {Path.cwd()}).")
    files = _files(root) if root.is_dir() else [root]
    text = "\n".join(document for file in files for document in _documents(file) if document)
    if not text.strip():
        raise DataError(f"{root} holds no text ({len(files)} files read).")
    return text.encode()


def _files(root: Path) -> list[Path]:
    found = (p for p in root.rglob("*") if p.is_file())
    return sorted(
        p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)
    )


def _documents(file: Path) -> Iterator[str]:
    text = _decoded(file)
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _text_field(file, number, line)


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}. Convert it (for "
            "example with iconv), or keep binary files out of the directory."
        ) from error


def _text_field(file: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} line {number} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        kind = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f'{file} line {number} has no "text" field with a string, found {kind}.')
    return record["text"]


def train_validation_split(
    tokens: np.ndarray, fraction: float = 0.05, num_chunks: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out `fraction` of the tokens, as contiguous chunks spread evenly over the text.

    Contiguous, so that almost no validation window shares text with a training window; spread, so
    that one unusual chapter does not decide the score. Deterministic.

    Args:
        tokens: `[n]`.
        fraction: share held out, in (0, 1).
        num_chunks: number of held-out chunks.

    Returns:
        `(train, validation)`; together they hold every token once.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction must lie between 0 and 1, got {fraction}.")
    num_chunks = max(1, min(num_chunks, int(len(tokens) * fraction)))
    edges = np.linspace(0, len(tokens), num_chunks + 1).astype(np.int64)
    held_out = np.zeros(len(tokens), bool)
    for start, stop in itertools.pairwise(edges):
        held_out[stop - round((stop - start) * fraction) : stop] = True
    train, validation = tokens[~held_out], tokens[held_out]
    if not len(train) or not len(validation):
        raise DataError(
            f"{len(tokens)} tokens are too few to hold out {fraction:.0%}: the split is "
            f"{len(train)} + {len(validation)}. Use more text."
        )
    return train, validation
