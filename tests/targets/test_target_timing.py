"""Timing with a clock of our own."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from autocomp.targets import timing
from autocomp.targets.timing import (
    Reference,
    Timing,
    fast_mean,
    time_interleaved,
    time_round_robin,
    undisturbed,
)


class Machine:
    """A clock that jobs advance; its speed drifts and some runs are disturbed."""

    def __init__(self, drift: float = 1.0) -> None:
        self.now, self.drift = 0, drift
        self.rng = random.Random(0)

    def job(self, ms: float):
        def run() -> None:
            noise = 3.0 if self.rng.random() < 0.3 else self.rng.uniform(1.0, 1.02)
            self.now += int(ms * 1e6 * self.drift * noise)

        return run

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing.time, "process_time_ns", lambda: self.now)
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e9)


def test_the_fast_mean_is_that_of_the_tenth_to_the_quarter():
    assert fast_mean(list(range(100, 0, -1))) == statistics.fmean(range(11, 26))
    assert fast_mean([7.0]) == 7.0


@pytest.mark.parametrize("drift", [1.0, 1.7])
def test_the_ratio_does_not_depend_on_the_machine(monkeypatch, drift):
    machine = Machine(drift)
    machine.install(monkeypatch)
    found = time_interleaved(machine.job(3.0), machine.job(1.5), single_threaded=True)
    assert found.ratio == pytest.approx(2.0, rel=0.01)
    assert found.anchor_ms == pytest.approx(1.5 * drift, rel=0.02)
    assert found.runs >= 40


def test_short_models_are_run_more_often(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    found = time_interleaved(
        machine.job(1.0), machine.job(1.0), single_threaded=True, runs=40, seconds=0.2
    )
    assert 150 <= found.runs <= 240
    found = time_interleaved(
        machine.job(0.01), machine.job(1.0), single_threaded=False, runs=40, seconds=9
    )
    assert 400 <= found.runs <= 440


def test_a_round_robin_finds_every_ratio(monkeypatch):
    machine = Machine(1.3)
    machine.install(monkeypatch)
    sizes = [0.2, 0.5, 4.0]
    found = time_round_robin(
        [machine.job(ms) for ms in sizes], machine.job(2.0), single_threaded=True
    )
    assert [one.ratio for one in found] == pytest.approx([0.1, 0.25, 2.0], rel=0.01)


@pytest.mark.parametrize(("warm", "expected"), [(0, 3.0), (1, 1.0)])
def test_cold_code_is_run_once_before_it_is_timed(monkeypatch, warm, expected):
    machine = Machine(1.3)
    machine.install(monkeypatch)
    before: list[object] = []

    def compiled(ms: float):
        """Takes thrice as long after another one ran."""

        def run() -> None:
            machine.job(ms if before == [run] else 3 * ms)()
            before[:] = [run]

        return run

    found = time_round_robin(
        [compiled(0.5) for _ in range(4)], machine.job(0.5), single_threaded=True, warm=warm
    )
    assert max(one.ratio for one in found) == pytest.approx(expected, rel=0.05)


def test_a_reference_survives_the_disk(tmp_path: Path):
    reference = Reference(1.5, "abc")
    reference.save(tmp_path / "reference.json")
    assert Reference.load(tmp_path / "reference.json") == reference


@pytest.mark.parametrize(
    ("anchors_ms", "used"),
    [([10.4, 9.0], 0), ([12.0, 10.1, 9.0], 1), ([12.0, 11.0, 11.5, 9.0], 1)],
    ids=["calm", "calm the second time", "never calm"],
)
def test_a_disturbed_timing_is_repeated(monkeypatch, anchors_ms: list[float], used: int):
    """While the anchor takes 5% longer than alone, thrice at most; the least disturbed counts."""
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    left = [Timing(1.0 + i, ms, 1.0, 0.1, 40) for i, ms in enumerate(anchors_ms)]
    assert undisturbed(lambda: left.pop(0), 10.0).ratio == 1.0 + used
    assert len(left) == 1
