"""A small zoo for the command line, the examples and the benchmarks; the library never imports it.

Plain Flax models: nothing in them knows shardtrain.
"""

from shardtrain.models.cnn import CNN
from shardtrain.models.decoder import Decoder, DecoderConfig
from shardtrain.models.moe import MoEConfig, MoEDecoder
from shardtrain.models.vit import ViT, ViTConfig

__all__ = ["CNN", "Decoder", "DecoderConfig", "MoEConfig", "MoEDecoder", "ViT", "ViTConfig"]
