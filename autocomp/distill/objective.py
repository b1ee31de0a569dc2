"""What a training makes smaller: the sum of losses that its settings name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from autocomp.core.candidate import Distillation
from autocomp.distill.known import Known
from autocomp.distill.losses import LOSSES
from autocomp.distill.losses.protocol import Batch, Outputs, Reading
from autocomp.distill.outputs import observe
from autocomp.tasks.protocol import Task


class Objective:
    """The first loss, plus the settings' weight times each of the others.

    Args:
        known: the teacher's side of the whole transfer set, if it is at hand; for what it does not
            hold, the teacher runs beside the student.
    """

    def __init__(
        self, teacher: nn.Module, task: Task, settings: Distillation, known: Known | None
    ) -> None:
        self._teacher, self._task, self._settings = teacher, task, settings
        self._known = known
        self._losses = [LOSSES.get(name) for name in settings.losses]

    def __call__(
        self, student: nn.Module, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, int]:
        """The loss, a scalar, and the number of classes there are.

        Inputs without `index` were sampled: they have no labels and no known logits.
        """
        sampled = "index" not in inputs
        losses = [loss for loss in self._losses if not (sampled and "labels" in loss.reads)]
        reads: set[Reading] = {reading for loss in losses for reading in loss.reads}
        target = self._target(inputs, reads)
        found = observe(student, self._task, inputs, reads)
        batch = Batch(inputs, self._task, self._settings)
        first, *others = (loss(found, target, batch) for loss in losses)
        total = first + self._settings.weight * sum(others) if others else first
        return total, target.logits.shape[-1]

    def ignorant(self, classes: int) -> float:
        """Roughly the loss of a student that knows nothing, in nats."""
        of_others = self._settings.weight * (len(self._losses) - 1)
        return (self._settings.temperature**2 + of_others) * math.log(classes)

    @torch.no_grad()
    def _target(self, inputs: Mapping[str, torch.Tensor], reads: set[Reading]) -> Outputs:
        known = self._known if "index" in inputs else None
        if known is not None and known.covers(reads):
            return known.outputs(inputs, reads)
        target = observe(self._teacher, self._task, inputs, reads)
        if known is None:
            return target
        return Outputs(known.outputs(inputs, ()).logits, target.hidden, target.attention)
