"""Screening: how far stitched, untrained candidates are from the teacher. Resident in a worker.

A screened candidate costs one stitch and one forward pass over the screening examples; the
teacher's logits on them are computed once. Screening examples are the first of the distil split:
neither the search split, which ranks trials, nor the report split is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autocomp.core.candidate import Candidate
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.models.load import load_model
from autocomp.tasks import make_task
from autocomp.tasks.divergence import teacher_kl
from autocomp.trial.context import TrialContext

BATCH = 32
LOGITS_AT_ONCE = 4_000_000
"""Logits of a batch: a vocabulary at every position of 32 chunks of text is gigabytes."""


class Screener:
    """Holds teacher, library and examples; `evaluate` scores a batch of candidates."""

    def __init__(self, context: TrialContext) -> None:
        torch.set_num_threads(1)
        self.context = context
        self.task = make_task(context.spec, context.model_path)
        self.teacher = load_model(context.teacher_path, self.task.name, self.task.num_labels)
        self.library = Library(context.library_path)
        wanted = min(context.spec.search.screen_examples, len(self.task.splits["distil"]))
        with torch.no_grad():
            inputs = next(iter(self.task.batches("distil", 1)))
            size = self.task.logits(self.teacher, inputs).numel()
            batch = max(1, min(BATCH, wanted, LOGITS_AT_ONCE // size))
            self.batches = [
                _first(inputs, wanted - start)
                for start, inputs in zip(
                    range(0, wanted, batch), self.task.batches("distil", batch), strict=False
                )
            ]
            self.reference = [self.task.logits(self.teacher, inputs) for inputs in self.batches]

    def evaluate(self, candidates: Sequence[dict[str, Any]]) -> list[float]:
        """Mean KL(teacher ‖ candidate) per candidate, in nats; `inf` where it is not finite.

        `candidates` are `Candidate.to_json()` mappings.
        """
        return [self.divergence(Candidate.from_json(data)) for data in candidates]

    @torch.no_grad()
    def divergence(self, candidate: Candidate) -> float:
        """Mean KL(teacher ‖ candidate) over the screening examples, in nats."""
        with self.context.gate.working():
            student = stitch(
                self.teacher, self.context.units, self.library, self.context.items, candidate
            )
        total, count = 0.0, 0
        for inputs, reference in zip(self.batches, self.reference, strict=True):
            with self.context.gate.working():
                value = teacher_kl(reference, self.task.logits(student, inputs))
            total += float(value) * len(reference)
            count += len(reference)
        mean = total / count
        return mean if math.isfinite(mean) else math.inf


def _first(inputs: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The first `count` examples of a batch."""
    return {name: tensor[:count] for name, tensor in inputs.items()}
