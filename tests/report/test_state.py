"""The state of a running search: phases and their ETA, the best of each kind, failures by cause."""

from __future__ import annotations

import pytest
from samples import BUDGET, baselines, failed, record

from autocomp.core.budget import Budget
from autocomp.core.measurement import Measurement
from autocomp.report.state import SearchState
from autocomp.study.activity import Activity


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> SearchState:
    return SearchState(clock)


def eta_s(state: SearchState, clock: Clock) -> float | None:
    assert state.current is not None
    return state.current.eta_s(clock())


def test_eta_at_an_even_rate(state: SearchState, clock: Clock) -> None:
    state.phase("library", total=100)
    assert eta_s(state, clock) is None
    for done in range(1, 11):
        clock.now_s = 2.0 * done
        state.advance(done)
    assert eta_s(state, clock) == pytest.approx(2.0 * 90)
    clock.now_s += 1.0
    assert eta_s(state, clock) == pytest.approx(2.0 * 90 - 1.0)


def test_eta_forgets_a_first_part_that_came_from_a_cache(state: SearchState, clock: Clock) -> None:
    state.phase("library", total=1000)
    clock.now_s = 0.1
    state.advance(500)
    for step in range(1, 101):
        clock.now_s = 0.1 + 3.0 * step
        state.advance(500 + step)
    assert eta_s(state, clock) == pytest.approx(3.0 * 400, rel=0.02)


def test_a_late_step_slows_the_rate(state: SearchState, clock: Clock) -> None:
    state.phase("trials", total=4)
    for done in (1, 2):
        clock.now_s = 10.0 * done
        state.advance(done)
    before = eta_s(state, clock)
    clock.now_s = 100.0
    late = eta_s(state, clock)
    assert before == pytest.approx(20.0)
    assert late is not None
    assert late > 0


def test_what_was_done_before_is_no_pace(state: SearchState, clock: Clock) -> None:
    state.phase("trials", total=14)
    state.advance(10)
    assert eta_s(state, clock) is None
    clock.now_s = 30.0
    state.advance(11)
    assert eta_s(state, clock) == pytest.approx(90.0)


def test_eta_is_zero_when_all_is_done(state: SearchState, clock: Clock) -> None:
    state.phase("scores", total=2)
    clock.now_s = 5.0
    state.advance(2)
    assert eta_s(state, clock) == 0


def test_the_total_may_come_with_the_first_step(state: SearchState, clock: Clock) -> None:
    state.phase("screening")
    clock.now_s = 1.0
    state.advance(1, 3)
    assert eta_s(state, clock) == pytest.approx(2.0)


def test_a_phase_ends_when_the_next_begins(state: SearchState, clock: Clock) -> None:
    state.phase("teacher", total=1)
    clock.now_s = 7.0
    state.phase("calibrate")
    clock.now_s = 9.0
    assert [phase.seconds(clock()) for phase in state.phases] == [7.0, 2.0]
    assert state.current is state.phases[1]


def test_the_best_meets_the_budget_before_it_is_good(state: SearchState) -> None:
    state.header(budget=BUDGET)
    fits = record(1, id="fits", quality=0.85, measured=Measurement("measured", 1.0, 9_000_000))
    better = record(2, id="over", quality=0.90, measured=Measurement("measured", 1.4, 9_000_000))
    for each in (better, fits):
        state.trial_finished(each)
    assert state.best("search") is fits
    assert state.excess(better) == pytest.approx({"latency_ms": 1.4 / 1.3 - 1})


def test_among_models_over_budget_the_nearest_is_best(state: SearchState) -> None:
    state.header(budget=Budget(latency_ms=0.1))
    for each in baselines():
        state.trial_finished(each)
    best = state.best("uniform")
    assert best is not None
    assert best.id == "uniform-int8"


def test_without_a_budget_quality_decides(state: SearchState) -> None:
    for each in baselines():
        state.trial_finished(each)
    best = state.best("uniform")
    assert best is not None
    assert best.quality == max(r.quality or 0 for r in baselines() if r.kind == "uniform")


def test_an_unmeasured_trial_is_never_best(state: SearchState) -> None:
    state.trial_finished(record(3, measured=None, quality=1.0))
    assert state.best("search") is None


def test_failures_that_differ_in_figures_are_one_cause(state: SearchState) -> None:
    for step in (3, 17, 250):
        state.trial_finished(failed(step))
    state.trial_finished(record(9, id="x", state="failed", error="out of memory", quality=None))
    state.trial_finished(record(9, id="y", state="failed", error=None, quality=None))
    assert state.failures() == [
        ("the loss became NaN at step 3", 3),
        ("out of memory", 1),
        ("unknown cause", 1),
    ]


def test_a_finished_trial_no_longer_runs(state: SearchState) -> None:
    done = record(5)
    state.trial_started(done.id, "milp")
    state.trial_started("other", "evolution")
    state.trial_finished(done)
    assert list(state.running) == ["other"]


def test_the_funnel_keeps_its_order(state: SearchState) -> None:
    state.funnel(measured=2, screened=9)
    state.funnel(measured=3)
    assert state.funnel_counts() == [("screened", 9), ("measured", 3)]


def test_a_running_trial_says_what_it_is_at(state: SearchState, clock: Clock) -> None:
    state.trial_started("8a6bc403cb", "evolution")
    state.trial_started("uniform-int8", "baseline")
    clock.now_s = 40.0
    state.trial_advanced("8a6bc403cb", Activity("distil", 625, 1000))
    state.trial_advanced("uniform-int8", Activity("measure"))
    state.trial_advanced("finished before", Activity("measure"))
    assert state.running_trials() == [
        "8a6bc403cb (evolution, 40s, distil 62%)",
        "uniform-int8 (baseline, 40s, measure)",
    ]
