"""The plain form of the live view: log lines, for files, pipes and continuous integration."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console

from autocomp.core.budget import Budget
from autocomp.core.quantities import format_seconds
from autocomp.report.live import describe_trial
from autocomp.report.state import SearchState
from autocomp.study.activity import Activity
from autocomp.study.records import TrialRecord

_EVERY_S = 10.0
_RUNNING_EVERY_S = 60.0


class LineView(SearchState):
    """One line when a phase starts and ends, about every ten seconds within, and when a trial
    starts and ends; trials that run long are told of once a minute.
    """

    def __init__(
        self,
        console: Console,
        *,
        study: str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`clock` gives seconds, monotonic; tests pass their own."""
        if clock is None:
            super().__init__()
        else:
            super().__init__(clock)
        self.console = console
        self.study = study
        self._told_s = self._told_running_s = self.started_s
        self._told_header = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.end_phase()

    def _print(self, text: str) -> None:
        self.console.print(
            f"[{format_seconds(self.elapsed_s()):>6}] {text}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def header(
        self,
        *,
        study: str | None = None,
        model: str | None = None,
        target: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        """See `SearchProgress`."""
        with self.lock:
            super().header(study=study, model=model, target=target, budget=budget)
            parts = [part for part in (self.study, self.model, self.target) if part]
            if self.budget is not None:
                parts.append(f"budget {self.budget.describe()}")
            line = " · ".join(parts)
            if line != self._told_header:
                self._told_header = line
                self._print(line)

    def phase(self, name: str, total: int | None = None) -> None:
        """See `SearchProgress`."""
        with self.lock:
            super().phase(name, total)
            self._told_s = self.clock()
            self._print(f"{name}: started" + (f", {total} steps" if total else ""))

    def end_phase(self) -> None:
        """The current phase is over."""
        with self.lock:
            current = self.current
            super().end_phase()
            if current is not None:
                self._print(
                    f"{current.name}: done in {format_seconds(current.seconds(self.clock()))}"
                )

    def advance(self, done: int, total: int | None = None) -> None:
        """See `SearchProgress`."""
        with self.lock:
            super().advance(done, total)
            current, now_s = self.current, self.clock()
            if current is None or now_s - self._told_s < _EVERY_S:
                return
            self._told_s = now_s
            if current.total:
                share = 100 * current.done / current.total
                eta = format_seconds(current.eta_s(now_s))
                self._print(
                    f"{current.name}: {current.done}/{current.total} ({share:.0f}%), ETA {eta}"
                )
            else:
                self._print(f"{current.name}: {current.done}")

    def trial_started(self, id: str, by: str) -> None:
        """See `SearchProgress`."""
        with self.lock:
            super().trial_started(id, by)
            if len(self.running) == 1:
                self._told_running_s = self.clock()
            self._print(f"trial {id} ({by}): started")

    def trial_advanced(self, id: str, activity: Activity) -> None:
        """See `SearchProgress`."""
        with self.lock:
            super().trial_advanced(id, activity)
            if self.running and self.clock() - self._told_running_s >= _RUNNING_EVERY_S:
                self._told_running_s = self.clock()
                self._print("running: " + "  ".join(self.running_trials()))

    def trial_finished(self, record: TrialRecord) -> None:
        """See `SearchProgress`."""
        with self.lock:
            super().trial_finished(record)
            self._print(describe_trial(record, self.dense(), self.budget))

    def note(self, text: str) -> None:
        """See `SearchProgress`."""
        with self.lock:
            super().note(text)
            self._print(text)
