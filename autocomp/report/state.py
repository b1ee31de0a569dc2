"""The state of a running search as its events tell it: phases with ETA, trials, failures.

`SearchState` implements `SearchProgress` and draws nothing; the live view and the plain log lines
are two ways of showing it.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from autocomp.core.budget import Budget
from autocomp.core.quantities import format_seconds
from autocomp.report.progress import FUNNEL
from autocomp.study.activity import Activity
from autocomp.study.records import TrialRecord, dense_reference

_WINDOW_S = 60.0
_WINDOW_CHANGES = 8
_AT_ONCE_S = 0.5
_STAGES = {"within_budget": "in budget"}


@dataclass
class PhaseState:
    """One phase: how far, since when, and how long it will still take.

    Attributes:
        done, total: steps; `total` is `None` while unknown.
        started_s, ended_s: on the state's clock.
        changes: recent (time, done) pairs, the start first; what the rate is taken from.
    """

    name: str
    total: int | None
    started_s: float
    ended_s: float | None = None
    done: int = 0
    changes: deque[tuple[float, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.changes.append((self.started_s, 0))

    def advance(self, done: int, total: int | None, now_s: float) -> None:
        """Note `done` steps at `now_s`."""
        if total is not None:
            self.total = total
        if done == self.done:
            return
        self.done = done
        if len(self.changes) == 1 and now_s - self.started_s < _AT_ONCE_S:
            self.changes[0] = (now_s, done)  # known from before: no part of the pace
            return
        self.changes.append((now_s, done))
        while len(self.changes) > _WINDOW_CHANGES and now_s - self.changes[1][0] > _WINDOW_S:
            self.changes.popleft()

    def seconds(self, now_s: float) -> float:
        """Duration so far, or of the whole phase once it is over."""
        return (self.ended_s if self.ended_s is not None else now_s) - self.started_s

    def eta_s(self, now_s: float) -> float | None:
        """Seconds still to go at the recent rate; `None` before the first step is done.

        The rate is that of the last minute, or of the last eight steps where those took longer, so
        that a first part served from a cache does not spoil it. A step that is late slows it.
        """
        if self.total is None or len(self.changes) < 2:
            return None
        (first_s, first), (last_s, last) = self.changes[0], self.changes[-1]
        steps = last - first
        if steps <= 0:
            return None
        step_s = max((last_s - first_s) / steps, (now_s - first_s) / (steps + 1))
        left = self.total - self.done
        return max(left * step_s - (now_s - last_s), 0.25 * step_s if left > 0 else 0.0)


@dataclass
class Running:
    """A trial that runs: who proposed it, since when on the state's clock, what it is at."""

    by: str
    started_s: float
    activity: Activity | None = None


class SearchState:
    """Accumulates the events of a search. Thread-safe; readers take `lock` around a whole read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.started_s = clock()
        self.study: str | None = None
        self.model: str | None = None
        self.target: str | None = None
        self.budget: Budget | None = None
        self.phases: list[PhaseState] = []
        self.counts: dict[str, int] = {}
        self.running: dict[str, Running] = {}
        self.trials: dict[str, TrialRecord] = {}
        self.notes: deque[str] = deque(maxlen=3)

    # The events of SearchProgress.

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
            self.study = study or self.study
            self.model = model or self.model
            self.target = target or self.target
            self.budget = budget or self.budget

    def phase(self, name: str, total: int | None = None) -> None:
        """See `SearchProgress`."""
        with self.lock:
            self.end_phase()
            self.phases.append(PhaseState(name, total, self.clock()))

    def advance(self, done: int, total: int | None = None) -> None:
        """See `SearchProgress`."""
        with self.lock:
            if self.phases:
                self.phases[-1].advance(done, total, self.clock())

    def funnel(self, **counts: int) -> None:
        """See `SearchProgress`."""
        with self.lock:
            self.counts.update(counts)

    def trial_started(self, id: str, by: str) -> None:
        """See `SearchProgress`."""
        with self.lock:
            self.running[id] = Running(by, self.clock())

    def trial_advanced(self, id: str, activity: Activity) -> None:
        """See `SearchProgress`."""
        with self.lock:
            if id in self.running:  # else it is over: what watches it is late
                self.running[id].activity = activity

    def trial_finished(self, record: TrialRecord) -> None:
        """See `SearchProgress`."""
        with self.lock:
            self.running.pop(record.id, None)
            self.trials[record.id] = record

    def note(self, text: str) -> None:
        """See `SearchProgress`."""
        with self.lock:
            self.notes.append(text)

    # What the views ask.

    def end_phase(self) -> None:
        """The current phase is over."""
        with self.lock:
            if self.phases and self.phases[-1].ended_s is None:
                self.phases[-1].ended_s = self.clock()

    @property
    def current(self) -> PhaseState | None:
        """The phase that is running, if any."""
        if self.phases and self.phases[-1].ended_s is None:
            return self.phases[-1]
        return None

    def elapsed_s(self) -> float:
        """Seconds since the view was opened."""
        return self.clock() - self.started_s

    def running_trials(self) -> list[str]:
        """Each trial that runs: `8a6bc403cb (evolution, 40s, distil 62%)`."""
        now_s = self.clock()
        return [
            f"{name} ({trial.by}, {format_seconds(now_s - trial.started_s)}"
            + (f", {trial.activity.describe()})" if trial.activity else ")")
            for name, trial in self.running.items()
        ]

    def funnel_counts(self) -> list[tuple[str, int]]:
        """The known stages in order, with readable names."""
        return [
            (_STAGES.get(name, name.replace("_", " ")), self.counts[name])
            for name in FUNNEL
            if name in self.counts
        ]

    def measured(self) -> list[TrialRecord]:
        """Finished trials with a quality and a measured cost."""
        return [
            record
            for record in self.trials.values()
            if record.state == "complete"
            and record.quality is not None
            and record.measured is not None
        ]

    def dense(self) -> TrialRecord | None:
        """The dense reference, once measured."""
        return dense_reference(self.measured())

    def best(self, kind: str) -> TrialRecord | None:
        """The best measured trial of this kind: feasible before nearest, then by quality."""
        candidates = [record for record in self.measured() if record.kind == kind]
        return min(candidates, key=self._rank, default=None)

    def excess(self, record: TrialRecord) -> dict[str, float]:
        """Relative overshoot of the dimensions over budget; empty when the record is feasible."""
        if self.budget is None or record.measured is None:
            return {}
        excess = self.budget.excess(record.measured, record.quality)
        return {name: value for name, value in excess.items() if value > 0}

    def _rank(self, record: TrialRecord) -> tuple[float, float, float]:
        over = max(self.excess(record).values(), default=0.0)
        latency_ms = record.measured.latency_ms if record.measured else None
        return (over, -(record.quality or 0.0), latency_ms or float("inf"))

    def failures(self) -> list[tuple[str, int]]:
        """Cause → count, the most frequent first. Causes that differ in figures only are one."""
        causes: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for record in self.trials.values():
            if record.state == "failed":
                lines = (record.error or "unknown cause").strip().splitlines()
                cause = lines[0] if lines else "unknown cause"
                key = re.sub(r"[0-9]+", "#", cause)
                causes.setdefault(key, cause)
                counts[key] += 1
        return [(causes[key], count) for key, count in counts.most_common()]
