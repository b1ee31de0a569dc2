"""What a running search tells its audience: a protocol, and the audience that does not listen."""

from __future__ import annotations

from typing import Protocol

from autocomp.core.budget import Budget
from autocomp.study.activity import Activity
from autocomp.study.records import TrialRecord

PHASES = (
    "teacher",
    "cost table",
    "calibrate",
    "library",
    "scores",
    "screening",
    "trials",
    "report",
)
"""The phases of a search, in order. A resumed search passes through them all, quickly."""

FUNNEL = ("screened", "within_budget", "stitched", "distilled", "measured", "on_front")
"""The stages a candidate can reach, in order."""


class SearchProgress(Protocol):
    """Events of a search, in this order: `header`, then per phase `phase` and `advance` repeatedly,
    with `funnel`, `trial_started`, `trial_advanced`, `trial_finished` and `note` at any time. Calls
    come from one process, any thread; none of them raises or blocks.
    """

    def header(
        self,
        *,
        study: str | None = None,
        model: str | None = None,
        target: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        """What is searched, for what, within what. May be called again as more becomes known."""
        ...

    def phase(self, name: str, total: int | None = None) -> None:
        """The previous phase is over and this one begins, with `total` steps if they are known."""
        ...

    def advance(self, done: int, total: int | None = None) -> None:
        """`done` of `total` steps of the current phase are done (absolute, not an increment)."""
        ...

    def funnel(self, **counts: int) -> None:
        """How many candidates reached each stage; keys from `FUNNEL`, absolute counts."""
        ...

    def trial_started(self, id: str, by: str) -> None:
        """A full trial began; `by` is its provenance (`baseline`, `milp`, `evolution`, …)."""
        ...

    def trial_advanced(self, id: str, activity: Activity) -> None:
        """A full trial that runs is now at this; about once a second, perhaps never."""
        ...

    def trial_finished(self, record: TrialRecord) -> None:
        """A full trial ended, well or not. Earlier trials of a resumed study are told too."""
        ...

    def note(self, text: str) -> None:
        """One line worth a person's attention."""
        ...


class Silent:
    """A `SearchProgress` that shows nothing."""

    def header(
        self,
        *,
        study: str | None = None,
        model: str | None = None,
        target: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Ignore."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Ignore."""

    def advance(self, done: int, total: int | None = None) -> None:
        """Ignore."""

    def funnel(self, **counts: int) -> None:
        """Ignore."""

    def trial_started(self, id: str, by: str) -> None:
        """Ignore."""

    def trial_advanced(self, id: str, activity: Activity) -> None:
        """Ignore."""

    def trial_finished(self, record: TrialRecord) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
