"""Retention: what a key wrote fades by a constant factor per head and token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocomp.models.mixers.protocol import MixerShape, repeated
from autocomp.models.mixers.recurrent_mixer import RecurrentMixer, Streams

FASTEST, SLOWEST = 1 / 32, 1 / 512
"""What a head loses in a token, at the start."""


class Retention(RecurrentMixer):
    """RetNet's multi-scale retention (equations 7 and 8), with decays that may be learnt.

    Inherited: W_Q, W_K, W_V, W_O, with rotary on queries and keys where the model has it (it is the
    xPos of the paper without its scale), and position embeddings where it has those; grouped heads
    repeated. New: γ per head, 1 - γ from the paper's 1/32 to 1/512; a gate, low-rank and starting
    at 1 in place of the paper's full one; the norm of each head, with a scale. Encoders take both
    directions, γ^|t - s|. Patches of an image count row by row (RMT, arXiv:2309.11523, instead
    takes their Manhattan distance, and adds a convolution); see `RecurrentMixer` for the prefix.
    """

    name = "retention"
    summary = "RetNet: a constant decay per head, multi-scale, then a norm and a gate."
    paper = "Sun et al., 2023, Retentive Network, arXiv:2307.08621"
    version = 2

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape, taps=1)
        fading = torch.linspace(math.log(FASTEST), math.log(SLOWEST), shape.heads).exp()
        self.fading = nn.Parameter(torch.logit(fading))

    def streams(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None
    ) -> Streams:
        """See `RecurrentMixer`."""
        heads = self.shape.heads
        key = repeated(heads, key) * self.shape.head_dim**-0.5
        decay = nn.functional.logsigmoid(-self.fading)[None, :, None, None]  # log(1 - fading)
        return Streams(query, key, repeated(heads, value), decay)
