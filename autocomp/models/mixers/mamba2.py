"""Mamba-2 (SSD): what a key wrote fades by a scalar that each token sets."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocomp.models.mixers.protocol import MixerShape, hidden_padding, repeated
from autocomp.models.mixers.recurrent_mixer import RecurrentMixer, Streams

CAUSAL_TAPS, CENTRED_TAPS = 4, 5
SHORTEST, LONGEST = 8.0, 512.0
"""Tokens after which a head has faded to 1/e, at the start."""


class Mamba2(RecurrentMixer):
    """Discrete Mamba-2, as MOHAWK distils it, in the place of attention.

    Inherited (Mamba in the Llama, arXiv:2408.15237; MOHAWK, arXiv:2408.10189): C ← W_Q, B ← W_K,
    x ← W_V, out ← W_O, with rotary where the model has it, and grouped heads repeated. As in MOHAWK
    B is not scaled by the step, the activation behind the convolution is the identity and D is 1;
    the convolution starts as the identity. New: log a = -softplus(w·x + bias) per head, starting
    constant at `SHORTEST` to `LONGEST` tokens; the gate, low-rank and starting at 1; and the norm
    behind the gate, per head. Encoders scan both ways with shared weights and the diagonal once
    (Hydra, arXiv:2407.09941), and centre the convolution.
    """

    name = "mamba2"
    summary = "Mamba-2: a decay that each token sets per head, a short convolution and a gate."
    paper = "Dao and Gu, 2024, Transformers are SSMs, arXiv:2405.21060"
    version = 2

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape, taps=CAUSAL_TAPS if shape.causal else CENTRED_TAPS)
        step = torch.linspace(-math.log(SHORTEST), -math.log(LONGEST), shape.heads).exp()
        self.step_weight = nn.Parameter(torch.zeros(shape.hidden, shape.heads))
        self.step_bias = nn.Parameter(torch.log(torch.expm1(step)))
        self.skip = nn.Parameter(torch.ones(shape.heads, 1, 1))

    def streams(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None
    ) -> Streams:
        """See `RecurrentMixer`."""
        heads = self.shape.heads
        step = nn.functional.softplus(x @ self.step_weight + self.step_bias)
        decay = -step.transpose(1, 2)[..., None]  # (B, H, T, 1)
        key, value, decay = hidden_padding(real, key, value, decay)
        key = repeated(heads, key) * self.shape.head_dim**-0.5
        return Streams(query, key, repeated(heads, value), decay)

    def finished(self, x: Tensor, out: Tensor, value: Tensor) -> Tensor:
        """See `RecurrentMixer`; the norm is behind the gate, as in the paper."""
        normed: Tensor = self.norm((out + self.skip * value) * self.gate(x))
        return normed
