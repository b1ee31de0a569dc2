"""What the trial driver is given: who proposes and judges, and who runs. No ray here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Json = dict[str, Any]

Running = Generator[Json, None, Json]
"""A trial that runs: it gives a report at each rung it comes to, and returns its result."""


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result; `died`: its worker process did, every time it was run."""

    cause: str
    died: bool = False


class Proposer(Protocol):
    """Decides what runs next. Called in the driver process, one call at a time."""

    def ask(self) -> tuple[str, Json] | None:
        """The next trial's key and JSON-ready payload; `None` ends the search."""
        ...

    def judge(self, key: str, report: Json) -> bool:
        """Whether a trial goes on after a rung; if not, it is told no more of."""
        ...

    def tell(self, key: str, result: Json | None, failure: Failure | None) -> None:
        """Outcome of one trial: its result, or why it failed. Exactly one of the two is `None`."""
        ...


class TrialRunner(Protocol):
    """Runs trials in a worker process, which it keeps from one trial to the next.

    Call sequence: `setup(context)` once per process, before its first trial; then `start` once per
    trial, whose generator is taken to its end, or closed at the rung where the trial is stopped. An
    exception in it fails that trial alone, with its message; the search goes on. What `setup`
    raises, and a `StorageError` of a trial, would fail every trial: it ends the search, and the
    trials in flight are not told. If the process dies the trial is started again elsewhere, so a
    trial stores its result durably, under its key, before it returns, and returns what is stored
    under its key already; what it has done by a rung it stores before it reports.
    """

    def setup(self, context: Mapping[str, Any]) -> None:
        """Load what stays resident."""
        ...

    def start(self, payload: Json) -> Running:
        """One trial; reports go to `Proposer.judge`, the result to `tell`, as they are."""
        ...


@dataclass(frozen=True)
class RunnerFactory:
    """How a worker makes its runner: an importable class and picklable arguments."""

    cls: Callable[..., TrialRunner]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> TrialRunner:
        """A new runner, not set up."""
        return self.cls(*self.args, **self.kwargs)
