"""Screening: how far stitched, untrained candidates are from the teacher. Resident in a worker.

A screened candidate costs one stitch and one forward pass over the screening examples; the
teacher's logits on them are computed once. Screening examples are the first of the distil split:
neither the search split, which ranks trials, nor the report split is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
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


class Screener:
    """Holds teacher, library and examples; `evaluate` scores a batch of candidates."""

    def __init__(self, context: TrialContext) -> None:
        torch.set_num_threads(1)
        self.context = context
        self.task = make_task(context.spec, context.model_path)
        self.teacher = load_model(context.teacher_path, self.task.name, self.task.num_labels)
        self.library = Library(context.library_path)
        count = -(-context.spec.search.screen_examples // BATCH)
        self.batches = list(islice(self.task.batches("distil", BATCH), count))
        with torch.no_grad():
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
