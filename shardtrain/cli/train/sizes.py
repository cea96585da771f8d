"""The models that `--model` names."""

from dataclasses import dataclass, replace

from shardtrain.errors import ModelError, suggest
from shardtrain.models import DecoderConfig


@dataclass(frozen=True)
class Size:
    """A decoder and the peak learning rate that suits it."""

    config: DecoderConfig
    learning_rate: float


SIZES = {
    "tiny": Size(DecoderConfig(num_layers=2, embed_dim=64, head_dim=8, mlp_dim=160), 5e-3),
    "small": Size(DecoderConfig(), 3e-3),
    "medium": Size(DecoderConfig(num_layers=8, embed_dim=512, head_dim=64, mlp_dim=1408), 1e-3),
    "large": Size(
        DecoderConfig(
            num_layers=16, embed_dim=1024, num_heads=16, num_kv_heads=8, head_dim=64, mlp_dim=2816
        ),
        6e-4,
    ),
}


def model_size(name: str, vocab_size: int, multiple: int = 128) -> Size:
    """The size of that name for a vocabulary, rounded up so that it divides over devices.

    Raises:
      ModelError: No size has this name.
    """
    if name not in SIZES:
        raise ModelError(f"--model {name}: {suggest(name, SIZES)}")
    vocab = -(-vocab_size // multiple) * multiple
    return replace(SIZES[name], config=replace(SIZES[name].config, vocab_size=vocab))
