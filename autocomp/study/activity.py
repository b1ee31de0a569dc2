"""How far the trials that run have come: a small file per trial, for whoever watches.

Workers write `work/running/ID.json` about once a second, by a rename, so that readers on any host
that shares the study see whole files. It is a courtesy, not a record: nothing is synced to disk,
and a file system that refuses is ignored (the trial's own writes will tell).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

EVERY_S = 1.0


@dataclass(frozen=True)
class Activity:
    """What a trial is at: `done` of `total` steps of a phase; without a `total` it has no steps."""

    phase: str
    done: int = 0
    total: int | None = None

    def describe(self) -> str:
        """`distil 62%`, or the phase alone."""
        if not self.total:
            return self.phase
        return f"{self.phase} {min(100, 100 * self.done // self.total)}%"


class ActivityWriter:
    """Writes one trial's activity.

    Call sequence: `enter(phase)` as a phase begins, `advance(done, total)` within it as often as
    one likes, `close()` at the end.
    """

    def __init__(
        self, directory: Path, trial: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds, monotonic."""
        self._path = directory / f"{trial}.json"
        self._clock = clock
        self._phase = ""
        self._written_s = 0.0

    def enter(self, phase: str) -> None:
        """Another phase begins; told at once."""
        self._phase = phase
        self._write(Activity(phase))

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` steps of the phase are done."""
        if self._clock() - self._written_s >= EVERY_S:
            self._write(Activity(self._phase, done, total))

    def close(self) -> None:
        """The trial is over."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self, activity: Activity) -> None:
        self._written_s = self._clock()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(activity)), encoding="utf-8")
            temporary.replace(self._path)


def read_activities(directory: Path) -> dict[str, Activity]:
    """Trial id → what it is at, of every trial that runs."""
    found: dict[str, Activity] = {}
    for path in directory.glob("[!.]*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # it ended meanwhile
            found[path.stem] = Activity(**json.loads(path.read_text(encoding="utf-8")))
    return found
