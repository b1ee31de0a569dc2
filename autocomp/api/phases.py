"""How long the phases of a search took, kept in the study's ledger.

One entry of kind `phase` per phase and call of `search`: `{"name", "seconds", "waited_s"}`, where
`waited_s` is the part in which the controller waited for workers to score or screen. What is left
of those phases, and what trials do not account for in theirs, is the controller's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from autocomp.core.budget import Budget
from autocomp.report.progress import SearchProgress
from autocomp.study.activity import Activity
from autocomp.study.ledger import Ledger
from autocomp.study.records import TrialRecord

KIND = "phase"


class PhaseTimes:
    """A `SearchProgress` that passes everything on and times the phases."""

    def __init__(self, progress: SearchProgress, ledger: Ledger) -> None:
        self._progress, self._ledger = progress, ledger
        self._call = datetime.now(UTC).isoformat()
        self._name: str | None = None
        self._began = self._waited = 0.0
        self._count = 0

    def phase(self, name: str, total: int | None = None) -> None:
        """See `SearchProgress`."""
        self.end()
        self._name, self._began, self._waited = name, time.perf_counter(), 0.0
        self._progress.phase(name, total)

    def end(self) -> None:
        """The last phase is over."""
        if self._name is None:
            return
        seconds = time.perf_counter() - self._began
        self._ledger.append(
            KIND,
            f"{self._call} {self._count}",
            {"name": self._name, "seconds": round(seconds, 3), "waited_s": round(self._waited, 3)},
        )
        self._name = None
        self._count += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While workers score or screen, and the controller does nothing else."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def header(
        self,
        *,
        study: str | None = None,
        model: str | None = None,
        target: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        """See `SearchProgress`."""
        self._progress.header(study=study, model=model, target=target, budget=budget)

    def advance(self, done: int, total: int | None = None) -> None:
        """See `SearchProgress`."""
        self._progress.advance(done, total)

    def funnel(self, **counts: int) -> None:
        """See `SearchProgress`."""
        self._progress.funnel(**counts)

    def trial_started(self, id: str, by: str) -> None:
        """See `SearchProgress`."""
        self._progress.trial_started(id, by)

    def trial_advanced(self, id: str, activity: Activity) -> None:
        """See `SearchProgress`."""
        self._progress.trial_advanced(id, activity)

    def trial_finished(self, record: TrialRecord) -> None:
        """See `SearchProgress`."""
        self._progress.trial_finished(record)

    def note(self, text: str) -> None:
        """See `SearchProgress`."""
        self._progress.note(text)
