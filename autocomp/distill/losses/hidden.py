"""Hidden states, layer by layer (Jiao et al. 2020, TinyBERT, arXiv:1909.10351)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.distill.losses.protocol import Batch, Outputs, Reading

if TYPE_CHECKING:
    import torch

_LEAST = 1e-6
"""Mean square below which a state counts as zero."""


class Hidden:
    """Squared error of the hidden states behind each layer, relative to the teacher's own square.

    Relative at every token, then the mean over real tokens and over layers: 1 is what a student
    that computes zeros would have. The few tokens whose states are hundreds of times larger than
    the others' (Sun et al. 2024, arXiv:2402.17762) would else be all that counts.

    TinyBERT maps the student's states to the teacher's width by a matrix that is learnt with it;
    students here keep the width of the residual stream, so there is none.
    """

    name = "hidden"
    summary = "Relative squared error of the hidden states behind each layer."
    paper = "Jiao et al., 2020, TinyBERT, arXiv:1909.10351"
    reads: tuple[Reading, ...] = ("hidden",)
    uses = ("layers",)
    divergence = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """See `Loss`."""
        return batch.mean_over_layers("hidden", student, teacher, _relative_error)


def _relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    square = teacher.square().mean(-1).clamp_min(_LEAST)
    return (student - teacher).square().mean(-1) / square


HIDDEN = Hidden()
