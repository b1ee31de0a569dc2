"""What the trial driver is given: who proposes, and who runs. No ray here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result; `died`: its worker process did, every time it was run."""

    cause: str
    died: bool = False


class Proposer(Protocol):
    """Decides what runs next. Called in the driver process, one call at a time."""

    def ask(self) -> tuple[str, dict[str, Any]] | None:
        """The next trial's key and JSON-ready payload; `None` ends the search."""
        ...

    def tell(self, key: str, result: dict[str, Any] | None, failure: Failure | None) -> None:
        """Outcome of one trial: its result, or why it failed. Exactly one of the two is `None`."""
        ...


class TrialRunner(Protocol):
    """Runs trials in a worker process, which it keeps from one trial to the next.

    Call sequence: `setup(context)` once per process, before its first trial; then `run` once per
    trial. An exception in `run` fails that trial alone, with its message; the search goes on. What
    `setup` raises, and a `StorageError` in `run`, would fail every trial: it ends the search, and
    the trials in flight are not told. If the process dies the trial is run again elsewhere, so
    `run` stores its result durably, under its key, before it returns, and returns what is stored
    under its key already.
    """

    def setup(self, context: Mapping[str, Any]) -> None:
        """Load what stays resident."""
        ...

    def run(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Run one trial; the result goes to `Proposer.tell` as it is."""
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
