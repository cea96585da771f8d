"""Drop-in pieces for people who write models: each knows the mesh it is traced under.

On one device, or without a mesh, every piece is the plain computation.
"""

from shardtrain.ops.attention import AttentionChoice, attention, choose_attention
from shardtrain.ops.chunked_cross_entropy import chunked_cross_entropy
from shardtrain.ops.experts import capacity_of, dispatch_experts, top_experts
from shardtrain.ops.ring_attention import ring_attention

__all__ = [
    "AttentionChoice",
    "attention",
    "capacity_of",
    "choose_attention",
    "chunked_cross_entropy",
    "dispatch_experts",
    "ring_attention",
    "top_experts",
]
