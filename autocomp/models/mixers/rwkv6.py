"""RWKV-6: what a key wrote fades channel by channel, by what each token sets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocomp.models.mixers.parts import seeded
from autocomp.models.mixers.protocol import MixerShape, hidden_padding, repeated, split_dim
from autocomp.models.mixers.recurrence import VECTOR_FLOOR, Diagonal
from autocomp.models.mixers.recurrent_mixer import RecurrentMixer, Streams

RANK = 32
SHORTEST, LONGEST = 4.0, 256.0
"""Tokens after which a channel has faded to 1/e, at the start."""


class RWKV6(RecurrentMixer):
    """RWKV-6 in the place of attention, from its weights.

    Inherited (RADLADS, arXiv:2505.03005): receptance ← W_Q, key ← W_K, value ← W_V, output ← W_O,
    with rotary where the model has it, and grouped heads repeated. From the same paper: log a =
    -exp(w0 + tanh(x W1) W2), not below -5, and keys times 1 - a, which keeps the state's size
    level. New: w0, channels of a head from `SHORTEST` to `LONGEST` tokens; W1 and W2 of rank 32,
    with W2 = 0; the bonus u of a token's own term, at 1; a low-rank gate starting at 1; the norm of
    each head. In place of the paper's token shift, which mixes what the projections read with the
    token before by weights that the token sets, there is a fixed filter behind them: a convolution
    of two taps (three for encoders), one per channel of queries, keys and values, that starts as
    the identity. Encoders scan both ways, the bonus counted once; see `RecurrentMixer` for images.
    """

    name = "rwkv6"
    summary = "RWKV-6: a decay that each token sets per channel, a bonus and a token shift."
    paper = "Peng et al., 2024, Eagle and Finch, arXiv:2404.05892"
    version = 2
    read_before = True

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape, taps=2 if shape.causal else 3)
        heads, width = shape.heads, shape.head_dim
        rates = torch.linspace(-math.log(SHORTEST), -math.log(LONGEST), width)
        rank = min(RANK, shape.hidden)
        self.decay_base = nn.Parameter(rates.repeat(heads))
        self.decay_down = seeded(shape.hidden, rank, scale=shape.hidden**-0.5)
        self.decay_up = nn.Parameter(torch.zeros(rank, heads * width))
        self.bonus = nn.Parameter(torch.ones(heads, width))

    def streams(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None
    ) -> Streams:
        """See `RecurrentMixer`."""
        heads = self.shape.heads
        rate = self.decay_base + (x @ self.decay_down).tanh() @ self.decay_up
        decay = -rate.clamp_max(math.log(-VECTOR_FLOOR)).exp()  # before exp: no infinite gradient
        decay = split_dim(decay, -1, (heads, -1)).transpose(1, 2)
        key, value, decay = hidden_padding(real, key, value, decay)
        key = repeated(heads, key) * -torch.expm1(decay) * self.shape.head_dim**-0.5
        return Streams(query, key, repeated(heads, value), decay)

    def diagonal(self) -> Diagonal:
        """See `RecurrentMixer`: the bonus."""
        return self.bonus
