"""KL divergence of the outputs, softened (Hinton, Vinyals & Dean 2015, arXiv:1503.02531)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.distill.losses.protocol import Batch, Outputs, Reading
from autocomp.tasks.divergence import teacher_kl

if TYPE_CHECKING:
    import torch


class Logits:
    """KL(teacher ‖ student) at a temperature τ, times τ² (section 2.1), in nats.

    The mean is over examples, or over tokens.
    """

    name = "logits"
    summary = "KL divergence of the student's outputs from the teacher's, softened."
    paper = "Hinton, Vinyals & Dean, 2015, arXiv:1503.02531"
    reads: tuple[Reading, ...] = ("logits",)
    uses = ("temperature",)
    divergence = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """See `Loss`."""
        temperature = batch.settings.temperature
        return teacher_kl(teacher.logits, student.logits, temperature=temperature) * temperature**2


LOGITS = Logits()
