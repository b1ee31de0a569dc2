"""The KL divergence the other way round (Gu et al. 2023, MiniLLM, arXiv:2306.08543)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.distill.losses.protocol import Batch, Outputs, Reading
from autocomp.tasks.divergence import teacher_kl

if TYPE_CHECKING:
    import torch


class ReverseKl:
    """KL(student ‖ teacher) at a temperature τ, times τ², in nats.

    It asks the student to be sure only where the teacher is, and lets it leave out what it has no
    room for; the forward divergence spreads a small student over all that the teacher might say.
    Taken over the whole vocabulary at every token, not by policy gradients as in the paper.
    """

    name = "reverse_kl"
    summary = "KL divergence of the teacher's outputs from the student's, softened."
    paper = "Gu et al., 2023, MiniLLM, arXiv:2306.08543"
    reads: tuple[Reading, ...] = ("logits",)
    uses = ("temperature",)
    divergence = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """See `Loss`."""
        temperature = batch.settings.temperature
        return teacher_kl(student.logits, teacher.logits, temperature=temperature) * temperature**2


REVERSE_KL = ReverseKl()
