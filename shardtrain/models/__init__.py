"""A small zoo for the command line, the examples and the benchmarks; the library never imports it.

Plain Flax models: nothing in them knows shardtrain.
"""

from shardtrain.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
