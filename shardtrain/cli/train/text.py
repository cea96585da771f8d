"""From paths to loaders: text, tokens, a training and a held-out part."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardtrain.data import (
    DataLoader,
    TokenDataset,
    Tokenizer,
    load_tokenizer,
    read_text,
    stdlib_text,
    train_validation_split,
)
from shardtrain.errors import DataError


@dataclass(frozen=True)
class Text:
    """Tokenized text.

    Args:
      name: Short, for the directory.
      description: One line for the summary.
      tokenizer: Text to tokens and back.
      train: int32 `[n]`.
      held_out: int32 `[m]`.
      bytes_per_token: Of the whole text: turns nats per token into nats per byte.
    """

    name: str
    description: str
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float


def load_text(paths: Sequence[Path], tokenizer_file: Path | None) -> Text:
    """Read and tokenize the user's text, or the standard library's source.

    Raises:
      DataError: Nothing readable; says which file.
    """
    if paths:
        raw = b"\n".join(read_text(path) for path in paths)
        name = paths[0].expanduser().resolve().stem or "data"
        what = ", ".join(map(str, paths))
    else:
        raw = stdlib_text()
        name, what = "stdlib", f"source of the Python {platform.python_version()} standard library"
    tokenizer = load_tokenizer(tokenizer_file)
    tokens = tokenizer.encode(raw)
    train, held_out = train_validation_split(tokens)
    unit = "bytes" if tokenizer_file is None else "tokens"
    return Text(
        name=name,
        description=f"{what}: {len(train):,} {unit} to train on, {len(held_out):,} held out",
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        bytes_per_token=len(raw) / len(tokens),
    )


def train_loader(text: Text, sequence: int, batch: int, seed: int) -> DataLoader:
    """Shuffled windows of the training part.

    Raises:
      DataError: The text has fewer windows than one batch.
    """
    windows = TokenDataset(text.train, sequence)
    if len(windows) < batch:
        raise DataError(
            f"{len(text.train):,} tokens make {len(windows)} sequences of {sequence}, fewer than "
            f"one batch of {batch}. Use more text, or --sequence and --batch that fit"
        )
    return DataLoader(windows, batch, seed=seed)


def eval_loader(text: Text, sequence: int, batch: int, num_batches: int = 8) -> DataLoader:
    """The held-out part: at most `num_batches` batches of windows spread evenly over it."""
    windows = TokenDataset(text.held_out, sequence)
    count = min(len(windows), num_batches * batch)
    chosen = [windows[i] for i in np.linspace(0, len(windows) - 1, count).astype(int)]
    columns = {key: np.stack([window[key] for window in chosen]) for key in chosen[0]}
    return DataLoader(columns, batch, allow_repeats=True)
