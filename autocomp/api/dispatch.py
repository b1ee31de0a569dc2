"""Between the search's proposer and the workers: asks ahead, tells, refits the cost table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from autocomp.api.predictor import TablePredictor
from autocomp.core.candidate import Runtime
from autocomp.core.gate import Gate
from autocomp.front.pick import front
from autocomp.report.progress import SearchProgress
from autocomp.search.proposal import Proposal
from autocomp.search.proposer import TrialProposer
from autocomp.search.rungs import Rungs
from autocomp.study.directory import Study, append_trial
from autocomp.study.records import RungRecord, TrialRecord, TrialState
from autocomp.workers.protocol import Failure

_OUT_OF_MEMORY = "most often memory ran out: take fewer workers"


class Dispatcher:
    """The workers' view of the proposer; refits the cost tables as measurements come in."""

    def __init__(
        self,
        study: Study,
        proposer: TrialProposer,
        tables: Mapping[Runtime, TablePredictor],
        progress: SearchProgress,
        deadline: float | None,
        rungs: Rungs | None = None,
    ) -> None:
        """`tables` are those of the runtimes that are searched; `rungs` judges trials in training.

        `deadline` is in `time.monotonic()` seconds; no trial is proposed after it.
        """
        self._study, self._proposer, self._tables = study, proposer, tables
        self._progress, self._deadline = progress, deadline
        self._gate, self._rungs = Gate(study.paths.gate), rungs
        self._next: Proposal | None = None
        self.late = False

    def ready(self) -> bool:
        """Whether there is anything to run."""
        if self._next is None:
            self._next = self._ask()
        return self._next is not None

    def ask(self) -> tuple[str, dict[str, Any]] | None:
        """See `workers.protocol.Proposer`."""
        asked, self._next = self._next or self._ask(), None
        if asked is not None:
            self._progress.trial_started(asked.id, asked.proposed_by)
            return asked.id, asked.to_json()
        return None

    def _ask(self) -> Proposal | None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.late = True
            return None
        with self._gate.working():
            return self._proposer.ask()

    def judge(self, key: str, report: dict[str, Any]) -> bool:
        """See `workers.protocol.Proposer`."""
        seen = RungRecord.from_json(report)
        if self._rungs is None or self._rungs.survives(seen):
            return True
        self._told(stopped(self._study, seen))
        return False

    def tell(self, key: str, result: dict[str, Any] | None, failure: Failure | None) -> None:
        """See `workers.protocol.Proposer`."""
        if result is None:
            assert failure is not None
            proposal = next(p for p in self._proposer.in_flight if p.id == key)
            record = _ended(
                self._study,
                proposal,
                "failed",
                error=f"{failure.cause}; {_OUT_OF_MEMORY}" if failure.died else failure.cause,
                by_machine=failure.died,
            )
        else:
            record = TrialRecord.from_json(result)
        self._told(record)

    def _told(self, record: TrialRecord) -> None:
        self._proposer.tell(record.id, record)
        records = self._study.trials()
        runtime = record.candidate.runtime
        if record.measured is not None and record.measured.device is not None:
            self._study.record_device(record.measured.device, runtime)  # a node may differ
        if runtime in self._tables:
            with self._gate.working():
                table = refitted(self._tables[runtime], runtime, records)
            self._proposer.correct(table, runtime)
        self._progress.funnel(**stages(records))
        self._progress.trial_finished(record)
        self._progress.advance(len([r for r in records if r.kind != "dense"]))


def stopped(study: Study, seen: RungRecord) -> TrialRecord:
    """The record of a trial that ends at this rung; it is in the ledger."""
    entries = study.ledger.read().of("rung").values()
    record = _ended(
        study,
        seen,
        "pruned",
        seconds=seen.seconds,
        rungs=tuple(RungRecord.from_json(its).seen for its in entries if its["id"] == seen.id),
        error=f"stopped after {seen.tokens:,} tokens: others were better there",
    )
    study.paths.checkpoint(seen.id).unlink(missing_ok=True)
    return record


def _ended(
    study: Study, trial: Proposal | RungRecord, state: TrialState, **more: Any
) -> TrialRecord:
    """The record of a trial that no worker writes; it is in the ledger."""
    record = TrialRecord(
        id=trial.id,
        kind=trial.kind,
        proposed_by=trial.proposed_by,
        state=state,
        candidate=trial.candidate,
        estimated=trial.estimated,
        **more,
    )
    append_trial(study.ledger, record)
    return record


def stages(records: Sequence[TrialRecord]) -> dict[str, int]:
    """How many candidates got how far in full trials, for the funnel. The dense model is none.

    A trial that failed had reached what was done before the phase it failed in; one without
    training was not distilled.
    """
    tried = [record for record in records if record.kind != "dense"]

    def beyond(record: TrialRecord, *phases: str) -> bool:
        return record.state == "complete" or any(phase in record.seconds for phase in phases)

    return {
        "stitched": sum(beyond(r, "rung", "distil", "export") for r in tried),
        "distilled": sum(
            beyond(r, "export") and r.candidate.distillation.tokens > 0 for r in tried
        ),
        "measured": sum(r.measured is not None for r in tried),
        "on_front": sum(r.kind != "dense" for r in front(records)),
    }


def refitted(
    table: TablePredictor, runtime: Runtime, records: Sequence[TrialRecord]
) -> TablePredictor:
    """A runtime's table, fitted to the trials measured on it too."""
    return table.refitted(
        [
            (dict(record.candidate.options), record.measured)
            for record in records
            if record.measured is not None and record.candidate.runtime == runtime
        ]
    )
