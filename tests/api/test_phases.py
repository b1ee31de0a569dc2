"""Phase times: kept in the ledger, one entry per phase and call, and every event passed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autocomp.api import phases
from autocomp.api.phases import PhaseTimes
from autocomp.report.progress import Silent
from autocomp.study.ledger import Ledger


class Clock:
    """Stands in for `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Audience(Silent):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def phase(self, name: str, total: int | None = None) -> None:
        self.heard.append((name, total))

    def advance(self, done: int, total: int | None = None) -> None:
        self.heard.append((done, total))

    def funnel(self, **counts: int) -> None:
        self.heard.append(counts)

    def note(self, text: str) -> None:
        self.heard.append(text)


def test_phases_are_timed_and_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, audience, ledger = Clock(), Audience(), Ledger(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(phases, "time", clock)
    times = PhaseTimes(audience, ledger)
    times.end()  # nothing has begun: nothing to keep
    clock.now = 5.0
    times.phase("scores", 3)
    for _ in range(2):
        clock.now += 1.0
        with times.waiting():
            clock.now += 2.0
    times.advance(3, 3)
    times.phase("trials")
    times.funnel(screened=4)
    times.note("late")
    clock.now += 10.0
    times.end()
    times.end()
    assert list(ledger.read().of("phase").values()) == [
        {"name": "scores", "seconds": 6.0, "waited_s": 4.0},
        {"name": "trials", "seconds": 10.0, "waited_s": 0.0},
    ]
    assert audience.heard == [("scores", 3), (3, 3), ("trials", None), {"screened": 4}, "late"]


def test_a_second_call_adds_to_the_first(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for _ in range(2):
        times = PhaseTimes(Silent(), ledger)
        times.phase("teacher")
        times.end()
    assert [p["name"] for p in ledger.read().of("phase").values()] == ["teacher", "teacher"]


def test_a_failed_wait_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ledger = Clock(), Ledger(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(phases, "time", clock)
    times = PhaseTimes(Silent(), ledger)
    times.phase("screening")

    def fail() -> None:
        with times.waiting():
            clock.now += 3.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    times.end()
    assert next(iter(ledger.read().of("phase").values()))["waited_s"] == 3.0
