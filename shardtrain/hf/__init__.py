"""Hugging Face checkpoints: safetensors into sharded arrays, and back."""

from shardtrain.hf.export import export_hf
from shardtrain.hf.load import load_hf

__all__ = ["export_hf", "load_hf"]
