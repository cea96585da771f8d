"""Data: global batch = f(seed, step), read by each process for its own devices only."""

from shardtrain.data.audit import audit_first_batch
from shardtrain.data.loader import DataLoader
from shardtrain.data.text import read_text, stdlib_text, train_validation_split
from shardtrain.data.tokens import ByteTokenizer, TokenDataset, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "DataLoader",
    "TokenDataset",
    "Tokenizer",
    "audit_first_batch",
    "load_tokenizer",
    "read_text",
    "stdlib_text",
    "train_validation_split",
]
