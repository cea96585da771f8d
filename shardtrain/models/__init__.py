"""A small zoo for the command line, the examples and the benchmarks; the library never imports it.

Plain Flax models: nothing in them knows shardtrain.
"""

from shardtrain.models.cnn import CNN
from shardtrain.models.decoder import Decoder, DecoderConfig
from shardtrain.models.gpt2 import GPT2, GPT2Config
from shardtrain.models.hf_config import from_hf_config
from shardtrain.models.moe import MoEConfig, MoEDecoder
from shardtrain.models.vit import ViT, ViTConfig

__all__ = [
    "CNN",
    "GPT2",
    "Decoder",
    "DecoderConfig",
    "GPT2Config",
    "MoEConfig",
    "MoEDecoder",
    "ViT",
    "ViTConfig",
    "from_hf_config",
]
