"""Screening: how far stitched, untrained candidates are from the teacher. Resident in a worker.

A screened candidate costs one stitch and one forward pass over the screening examples; the
teacher's logits on them are computed once. Screening examples are the first of the distil split:
neither the search split, which ranks trials, nor the report split is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autocomp.core.candidate import Candidate
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.models.load import load_model
from autocomp.models.pruned_table import model_vocabulary
from autocomp.models.vocabulary import Vocabulary
from autocomp.tasks import make_task
from autocomp.tasks.divergence import teacher_kl
from autocomp.tasks.protocol import Task
from autocomp.tasks.vocabulary import retokenised
from autocomp.trial.context import TrialContext
from autocomp.trial.prefixes import Prefixes

BATCH = 32
LOGITS_AT_ONCE = 4_000_000
"""Logits of a batch: a vocabulary at every position of 32 chunks of text is gigabytes."""


@dataclass(frozen=True)
class Examples:
    """Examples in batches, and the teacher's logits on each batch."""

    prefixes: Prefixes
    reference: Sequence[torch.Tensor]


class Screener:
    """Holds teacher, library and examples; `evaluate` scores a batch of candidates."""

    def __init__(self, context: TrialContext) -> None:
        torch.set_num_threads(1)
        self.context = context
        self.task = make_task(context.spec, context.model_path)
        trusted = context.spec.model.trust_remote_code
        self.teacher = load_model(
            context.teacher_path, self.task.name, self.task.num_labels, trusted
        )
        self.library = Library(context.library_path)
        wanted = min(context.spec.search.screen_examples, len(self.task.splits["distil"]))
        with torch.no_grad():
            inputs = next(iter(self.task.batches("distil", 1)))
            size = self.task.logits(self.teacher, inputs).numel()
            batch = max(1, min(BATCH, wanted, LOGITS_AT_ONCE // size))
            self._read = partial(_read, batch=batch, limit=wanted)
            whole, self._order = self._read(self.task)
            reference = [self.task.logits(self.teacher, inputs) for inputs in whole]
        self._shortened: tuple[Vocabulary, Examples] | None = None
        self.examples = Examples(Prefixes(context.units, whole), reference)

    def evaluate(self, candidates: Sequence[dict[str, Any]]) -> list[float]:
        """Mean KL(teacher ‖ candidate) per candidate, in nats; `inf` where it is not finite.

        `candidates` are `Candidate.to_json()` mappings. Those that begin alike are evaluated one
        after the other, so that what they share is computed once.
        """
        decoded = [Candidate.from_json(data) for data in candidates]
        order = sorted(range(len(decoded)), key=lambda at: [o.key for _, o in decoded[at]])
        values = [math.inf] * len(decoded)
        for place, at in enumerate(order):
            keep = 0
            for following in order[place + 1 : place + 2]:
                keep = self.examples.prefixes.common(decoded[at], decoded[following])
            values[at] = self.divergence(decoded[at], keep)
        return values

    @torch.no_grad()
    def divergence(self, candidate: Candidate, keep: int = 0) -> float:
        """Mean KL(teacher ‖ candidate) over the screening examples, in nats.

        `keep`: remember what the candidate's first `keep` blocks give, for others like it.
        """
        gate = self.context.gate
        with gate.working():
            student = stitch(
                self.teacher, self.context.units, self.library, self.context.items, candidate
            )

        def run(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            with gate.working():
                return self.task.logits(model, inputs)

        total, count = 0.0, 0
        examples = self._examples(model_vocabulary(student))
        outputs = examples.prefixes.outputs(student, candidate, run, keep)
        for logits, reference in zip(outputs, examples.reference, strict=True):
            total += float(teacher_kl(reference, logits)) * len(reference)
            count += len(reference)
        mean = total / count
        return mean if math.isfinite(mean) else math.inf

    def _examples(self, vocabulary: Vocabulary | None) -> Examples:
        """The examples as a model with this vocabulary reads them, beside the teacher's logits."""
        if vocabulary is None:
            return self.examples
        if self._shortened is None or self._shortened[0] != vocabulary:
            task = retokenised(self.context.spec, self.context.model_path, vocabulary)
            batches, order = self._read(task)
            places, logits = torch.cat(self._order), torch.cat(list(self.examples.reference))
            known = dict(zip(places.tolist(), logits, strict=True))
            reference = [torch.stack([known[place] for place in at.tolist()]) for at in order]
            examples = Examples(Prefixes(self.context.units, batches), reference)
            self._shortened = (vocabulary, examples)
        return self._shortened[1]


def _read(
    task: Task, batch: int, limit: int
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Batches of the first `limit` examples of the distil split, and which these are."""
    found = list(task.batches("distil", batch, seed=0, index=True, limit=limit))
    return found, [inputs.pop("index") for inputs in found]
