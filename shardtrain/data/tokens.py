"""Tokens: bytes or a Hugging Face tokenizer file, cut into fixed windows for language models."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shardtrain.errors import DataError


class Tokenizer(Protocol):
    """Text ↔ token ids."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; all ids are smaller."""
        ...

    def encode(self, text: bytes) -> np.ndarray:
        """UTF-8 text → int32 `[n]`."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Token ids → text; undecodable bytes become �."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per byte: no vocabulary to download, and nothing it cannot express.

    Example:
        >>> ByteTokenizer().decode(ByteTokenizer().encode("naïve".encode()))
        'naïve'
    """

    vocab_size: int = 256

    def encode(self, text: bytes) -> np.ndarray:
        """UTF-8 text → int32 `[bytes]`."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Byte values → text."""
        return np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """A `tokenizer.json` in the format of Hugging Face `tokenizers`."""

    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: bytes) -> np.ndarray:
        """UTF-8 text → int32 `[n]`, without special tokens."""
        ids = self.tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids
        return np.asarray(ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Token ids → text."""
        return self.tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer in `path` (a `tokenizer.json`), or bytes when there is none.

    Raises:
        DataError: the file is missing or damaged, or the package `tokenizers` is not installed.
    """
    if path is None:
        return ByteTokenizer()
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"no tokenizer file {file}. Pass the path of a tokenizer.json.")
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise DataError(
            f"{file} needs the package `tokenizers`: pip install 'shardtrain[hf]'."
        ) from error
    try:
        return FileTokenizer(tokenizers.Tokenizer.from_str(file.read_text("utf-8")))
    except Exception as error:  # the package raises bare Exception for anything unreadable
        raise DataError(f"{file} is not a tokenizer.json: {error}") from error


class TokenDataset:
    """Windows of a token stream: example i predicts each next token of window i.

    Windows do not overlap; the last one is filled up with zeros whose mask is 0, so that every
    token but the first is predicted exactly once per epoch.

    Args:
        tokens: integers `[n]`, n ≥ 2.
        sequence_length: T, tokens per example.

    Example:
        >>> TokenDataset(np.arange(6), 4)[1]["mask"].tolist()
        [1.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(f"tokens must be integers [n], got {tokens.dtype}{list(tokens.shape)}.")
        if sequence_length < 1:
            raise DataError(f"sequence_length must be at least 1, got {sequence_length}.")
        if len(tokens) < 2:
            raise DataError(f"{len(tokens)} tokens are too few: nothing can be predicted.")
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`{"tokens": int32[T], "targets": int32[T], "mask": float32[T]}`."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.sequence_length
        window = self.tokens[start : start + self.sequence_length + 1].astype(np.int32)
        missing = self.sequence_length + 1 - len(window)
        window = np.pad(window, (0, missing))
        mask = np.ones(self.sequence_length, np.float32)
        mask[self.sequence_length - missing :] = 0
        return {"tokens": window[:-1], "targets": window[1:], "mask": mask}
