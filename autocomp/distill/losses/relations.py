"""Relations between tokens (Wang et al. 2021, MiniLMv2, arXiv:2012.15828)."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from autocomp.distill.losses.protocol import Batch, Outputs, Reading

if TYPE_CHECKING:
    import torch

RELATION_WIDTH = 16
"""Channels of a relation head: 48 heads for BERT base and 64 for large did best in the paper."""


class Relations:
    """KL divergence of how alike tokens are to each other, in what attention makes of them.

    MiniLMv2 compares softmax(A Aᵀ / √d) for queries, keys and values A, cut into as many heads on
    both sides whatever heads the models have. A student here may have fewer heads, or another mixer
    that reads neither queries nor keys; what its attention writes, behind the output projection, it
    has wherever it has any, and as wide as the teacher's. So A is that. Layers whose attention was
    skipped have none and are left out.

    The mean is over real tokens, relation heads and layers, in nats.
    """

    name = "relations"
    summary = "KL divergence of the relations between tokens in what attention writes."
    paper = "Wang et al., 2021, MiniLMv2, arXiv:2012.15828"
    reads: tuple[Reading, ...] = ("attention",)
    uses = ("layers",)
    divergence = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """See `Loss`."""
        compare = partial(_divergence, real=batch.real)
        return batch.mean_over_layers("attention", student, teacher, compare)


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor | None
) -> torch.Tensor:
    target, guess = _relations(teacher, real), _relations(student, real)
    return (target.exp() * (target - guess)).sum(-1).mean(1)


def _relations(states: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """States `(B, T, D)` → log-probabilities `(B, R, T, T)`: to which token each is how near."""
    batch, tokens, channels = states.shape
    width = math.gcd(channels, RELATION_WIDTH)
    heads = states.view(batch, tokens, -1, width).transpose(1, 2)  # (B, R, T, width)
    scores = heads @ heads.mT / math.sqrt(width)
    if real is not None:  # softmax makes nothing of this number, and NaN of an infinity
        scores = scores.masked_fill(~real[:, None, None, :], -1e9)
    return scores.log_softmax(-1)


RELATIONS = Relations()
