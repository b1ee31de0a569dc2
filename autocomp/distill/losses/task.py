"""The task's own loss: the labels beside the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.distill.losses.protocol import Batch, Outputs, Reading

if TYPE_CHECKING:
    import torch


class TaskLoss:
    """Cross-entropy of the labels, in nats: the hard targets beside the soft ones (section 2)."""

    name = "task"
    summary = "Cross-entropy of the labels."
    paper = "Hinton, Vinyals & Dean, 2015, arXiv:1503.02531"
    reads: tuple[Reading, ...] = ("logits", "labels")
    uses: tuple[str, ...] = ()
    divergence = False

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """See `Loss`."""
        return batch.task.loss(student.logits, batch.inputs["labels"])


TASK = TaskLoss()
