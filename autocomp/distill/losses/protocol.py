"""What a loss is: the protocol, and what it is given. No torch at import.

A loss is a number to make smaller: a scalar, the mean over what is real in a batch. Divergences
are zero, and have no gradient, where the student computes what the teacher does. A sum of losses
is led by a divergence of the outputs; the others are added with the weight of the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from autocomp.core.candidate import Distillation

if TYPE_CHECKING:
    import torch

    from autocomp.tasks.protocol import Task

Reading = Literal["logits", "hidden", "attention", "labels"]


@dataclass(frozen=True)
class Outputs:
    """What a model computed on a batch; of layers only what some loss reads.

    Attributes:
        logits: `(B, C)`, or `(B, T, V)` for language modelling.
        hidden: layer → hidden states behind it, `(B, T, D)`.
        attention: layer → what its attention adds to them, `(B, T, D)`, behind the output
            projection; layers whose attention was skipped are missing.
    """

    logits: torch.Tensor
    hidden: Mapping[int, torch.Tensor]
    attention: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """What student and teacher were asked.

    Attributes:
        inputs: as the task gives them, with `labels`.
        task: the task, for its own loss.
        settings: of the training.
    """

    inputs: Mapping[str, torch.Tensor]
    task: Task
    settings: Distillation

    @property
    def real(self) -> torch.Tensor | None:
        """Real tokens, bool `(B, T)`; `None` where all are."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    def mean_over_layers(
        self,
        of: Literal["hidden", "attention"],
        student: Outputs,
        teacher: Outputs,
        compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The mean over layers and real tokens of what `compare` says of both sides; 0 if none.

        Args:
            compare: student's and teacher's side of a layer, `(B, T, D)` each → `(B, T)`.
        """
        real = self.real
        found = [
            compare(*sides) for sides in self.pairs(getattr(student, of), getattr(teacher, of))
        ]
        means = [each.mean() if real is None else each[real].mean() for each in found]
        return sum(means, student.logits.new_zeros(())) / max(1, len(means))

    def pairs(
        self, student: Mapping[int, torch.Tensor], teacher: Mapping[int, torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Student's and teacher's side of the layers to compare, `(B, T, D)` each.

        A student keeps its teacher's layers and their width, so a layer's counterpart is the layer
        itself. Left out is one that the student does not have, or where it has merged tokens.
        """
        shared = [
            layer
            for layer in sorted(student)
            if layer in teacher and student[layer].shape == teacher[layer].shape
        ]
        chosen = shared[-1:] if self.settings.layers == "last" else shared
        return [(student[layer], teacher[layer]) for layer in chosen]


class Loss(Protocol):
    """One loss.

    Attributes:
        name: as in a spec.
        summary: one sentence, for `autocomp ls losses`.
        paper: where it comes from.
        reads: what it looks at. One that reads the logits alone may lead a sum; one that reads
            labels is left out of batches that the student sampled.
        uses: the settings it depends on, names of fields of `Distillation`: where none of a sum's
            losses uses `layers` or `top_k`, that is no dimension of the trial.
        divergence: whether it is never negative, and zero, without gradient, where the student
            equals the teacher.
    """

    name: str
    summary: str
    paper: str
    reads: tuple[Reading, ...]
    uses: tuple[str, ...]
    divergence: bool

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """A differentiable scalar. The teacher's side carries no gradient."""
        ...
