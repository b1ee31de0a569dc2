"""A trial's training from rung to rung: looked at, checkpointed, recorded, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from autocomp.core.errors import AutocompError
from autocomp.distill.trainer import Trainer
from autocomp.study.activity import ActivityWriter
from autocomp.study.ledger import Ledger
from autocomp.study.records import RungRecord, TrialRecord
from autocomp.tasks.protocol import Evaluation

logger = logging.getLogger(__name__)

Phase = Callable[[str], AbstractContextManager[None]]


class Climb:
    """One trial's way up. A checkpoint of an earlier process is gone on from.

    Args:
        record: of the trial, as far as it is known.
        trainer: of its student, new.
        look: evaluates the student as it is on the search split.
        stitched: what it gave before training. A student that is further from the teacher at a rung
            is judged by this: were it no closer in the end, its training would be undone.
        checkpoint: where the training is kept; whoever ends the trial removes it.
    """

    def __init__(
        self,
        record: TrialRecord,
        trainer: Trainer,
        look: Callable[[], Evaluation],
        stitched: Evaluation,
        ledger: Ledger,
        checkpoint: Path,
    ) -> None:
        self._record, self._trainer, self._look = record, trainer, look
        self._stitched = stitched
        self._ledger, self._checkpoint = ledger, checkpoint
        self._tokens = record.candidate.distillation.tokens

    def run(
        self,
        shares: Sequence[float],
        phase: Phase,
        seconds: Mapping[str, float],
        activity: ActivityWriter,
    ) -> Generator[dict[str, Any], None, TrialRecord]:
        """Train to the end, looking at the student at shares of its tokens.

        Yields:
            A `RungRecord` as JSON at each rung, once it and the checkpoint are stored.

        Returns:
            The record, with what was seen.
        """

        def advance(tokens: int) -> None:
            with phase("distil"):
                self._trainer.advance(tokens, lambda done, _: activity.advance(done, self._tokens))

        rungs = self._rungs(shares)
        behind = self._resumed()
        for number, tokens in list(enumerate(rungs))[len(behind) :]:
            advance(tokens)
            with phase("rung"):
                seen = self._look()
                evaluation = self._stitched if further(seen, self._stitched) else seen
                self._trainer.save(self._checkpoint)
            report = self._report(number, tokens, evaluation, seconds)
            self._ledger.append("rung", report.key, report.to_json())
            behind.append(report)
            yield report.to_json()
        advance(self._tokens)
        return replace(self._record, rungs=tuple(report.seen for report in behind))

    def _rungs(self, shares: Sequence[float]) -> list[int]:
        """In tokens; baselines are run to their end."""
        if self._record.kind != "search":
            return []
        return [rung for share in shares if (rung := round(share * self._tokens)) > 0]

    def _report(
        self, number: int, tokens: int, evaluation: Evaluation, seconds: Mapping[str, float]
    ) -> RungRecord:
        record = self._record
        return RungRecord(
            id=record.id,
            kind=record.kind,
            proposed_by=record.proposed_by,
            candidate=record.candidate,
            estimated=record.estimated,
            rung=number,
            tokens=tokens,
            quality=evaluation.quality.value,
            teacher_kl=evaluation.teacher_kl,
            seconds=dict(seconds),
        )

    def _resumed(self) -> list[RungRecord]:
        """Load the checkpoint of an earlier start, if there is one; the rungs it has behind it."""
        if not self._checkpoint.exists():
            return []
        try:
            self._trainer.load(self._checkpoint)
        except AutocompError as error:
            logger.warning("trial %s trains again from its start: %s", self._record.id, error)
            return []
        known = self._ledger.read().of("rung").values()
        reports = (RungRecord.from_json(entry) for entry in known if entry["id"] == self._record.id)
        seen = self._trainer.result.tokens
        return sorted((r for r in reports if r.tokens <= seen), key=lambda report: report.rung)


def further(trained: Evaluation, stitched: Evaluation) -> bool:
    """Whether training led away from the teacher.

    A student that is close already has small gradients, and AdamW steps by the learning rate
    however small they are.
    """
    assert trained.teacher_kl is not None
    assert stitched.teacher_kl is not None
    return trained.teacher_kl > stitched.teacher_kl
