"""A bidirectional LSTM classifier over sequences of unequal length, in Linen."""

import flax.linen as nn

import shardtrain as st
from zoo.case import VOCAB, Case, tokens


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, ids, lengths):
        x = nn.Embed(VOCAB, 8)(ids)
        forward = nn.RNN(nn.OptimizedLSTMCell(16))
        backward = nn.RNN(nn.OptimizedLSTMCell(16), reverse=True, keep_order=True)
        x = nn.Bidirectional(forward, backward)(x, seq_lengths=lengths)
        return nn.Dense(VOCAB)(x)


def loss(model, batch):
    lengths = batch["mask"].sum(-1).astype(int)
    return st.cross_entropy(model(batch["tokens"], lengths), batch["tokens"], batch["mask"])


CASES = (Case("lstm", LSTM, loss, tokens),)
