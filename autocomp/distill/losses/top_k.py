"""KL divergence over what the teacher finds likely, everything else as one outcome.

Over a large vocabulary most of the divergence's gradient is spent on tokens that the teacher never
means (Anshumann et al. 2025, Sparse Logit Sampling, arXiv:2503.16870, on what goes wrong when they
are cut off and the rest scaled up: the student is told to be surer than the teacher). Lumping them
together keeps a divergence of two distributions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.distill.losses.protocol import Batch, Outputs, Reading
from autocomp.tasks.divergence import at_least_float32

if TYPE_CHECKING:
    import torch


class TopK:
    """KL(teacher ‖ student) over the teacher's k likeliest classes and one for the rest, times τ².

    At most the whole divergence (data processing inequality), equal to it where k leaves out one
    class or none.
    """

    name = "top_k"
    summary = "KL divergence over the teacher's likeliest classes, all others taken as one."
    paper = "Anshumann et al., 2025, arXiv:2503.16870"
    reads: tuple[Reading, ...] = ("logits",)
    uses = ("temperature", "top_k")
    divergence = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """See `Loss`."""
        temperature = batch.settings.temperature
        known = (at_least_float32(teacher.logits) / temperature).log_softmax(-1)
        found = (at_least_float32(student.logits) / temperature).log_softmax(-1)
        likely = known.topk(min(batch.settings.top_k, known.shape[-1]), dim=-1).indices
        target, guess = _lumped(known, likely), _lumped(found, likely)
        return (target.exp() * (target - guess)).sum(-1).mean() * temperature**2


def _lumped(log_probabilities: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(..., V)` → `(..., k + 1)`: of the likely classes, and of the others."""
    import torch

    chosen = log_probabilities.gather(-1, likely)
    if likely.shape[-1] == log_probabilities.shape[-1]:
        return chosen
    others = log_probabilities.scatter(-1, likely, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], dim=-1)


TOP_K = TopK()
