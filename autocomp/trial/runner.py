"""A full trial: stitch → distil → export → evaluate the artifact → measure. Resident in a worker.

The record is appended to the ledger, durable, before `run` returns: whatever happens to the
controller afterwards, a finished trial is never run again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from autocomp.core.candidate import Candidate
from autocomp.core.errors import AutocompError
from autocomp.core.measurement import Measurement
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.models.load import load_model
from autocomp.study.directory import Study
from autocomp.study.records import TrialRecord
from autocomp.targets import make_target
from autocomp.tasks import load_task
from autocomp.trial.context import TrialContext
from autocomp.trial.distil import DivergedError, distil


class TrialRunner:
    """Holds teacher, library, task and target; `run` carries one candidate to a measured artifact."""

    def __init__(self, context: TrialContext) -> None:
        torch.set_num_threads(1)
        self.context = context
        self.study = Study.open(context.study_path)
        self.task = load_task(context.spec, context.model_path)
        self.teacher = load_model(context.teacher_path, self.task.name)
        self.library = Library(context.library_path)
        self.target = make_target(context.spec.target, context.gate, context.study_path)

    def run(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Run one trial.

        Args:
            payload: `id`, `kind`, `proposed_by`, `candidate` (JSON) and `estimated` (JSON or None).

        Returns:
            The record as JSON. A candidate that cannot be carried out (training diverged, the
            artifact disagrees with the model) gives a record in state `failed` with its cause.
        """
        candidate = Candidate.from_json(payload["candidate"])
        estimated = payload.get("estimated")
        record = TrialRecord(
            id=payload["id"],
            kind=payload["kind"],
            proposed_by=payload["proposed_by"],
            state="failed",
            candidate=candidate,
            estimated=Measurement.from_json(estimated) if estimated else None,
        )
        seconds: dict[str, float] = {}
        try:
            record = self._carry_out(record, candidate, seconds)
        except AutocompError as error:
            record = replace(record, error=str(error))
        record = replace(
            record, seconds=seconds, finished_at=datetime.now(UTC).isoformat(timespec="seconds")
        )
        self.study.ledger.append("trial", candidate.key, record.to_json())
        return record.to_json()

    def _carry_out(
        self, record: TrialRecord, candidate: Candidate, seconds: dict[str, float]
    ) -> TrialRecord:
        spec, context = self.context.spec, self.context
        with _timed(seconds, "stitch"):
            student = stitch(self.teacher, context.units, self.library, context.items, candidate)
        with _timed(seconds, "distil"):
            distil(
                student,
                self.teacher,
                self.task,
                candidate.distillation,
                batch=spec.distill.batch,
                seed=spec.search.seed,
                gate=context.gate,
            )
        directory = self.study.artifacts / record.id
        with _timed(seconds, "export"):
            shutil.rmtree(directory, ignore_errors=True)
            artifact = self.target.write(student, context.units, self.task, directory)
            self.target.verify(artifact, student, self.task.example_inputs())
        with _timed(seconds, "evaluate"), self.target.session(artifact) as run:
            evaluation = self.task.evaluate(run, "search", teacher=self.teacher)
        with _timed(seconds, "measure"):
            measured = self.target.measure(artifact, self.task.example_inputs())
        quality = evaluation.quality
        if not _finite(quality.value):
            raise DivergedError(f"the exported model's {quality.metric} is not a finite number")
        return replace(
            record,
            state="complete",
            quality=quality.value,
            teacher_kl=evaluation.teacher_kl,
            metric={"name": quality.metric, "value": quality.metric_value},
            measured=measured,
            artifact=str(directory.relative_to(context.study_path)),
        )


def _finite(value: float) -> bool:
    return value == value and value not in (float("inf"), float("-inf"))


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = round(time.perf_counter() - start, 3)
