"""The trial taken under a budget: the simplest as good as the best, never a clearly worse one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.measurement import Measurement
from autocomp.core.metric import Scale
from autocomp.front import Noise, NothingFitsError, choose, front_json
from autocomp.front.choice import distinct_options
from autocomp.report.finalists import selection_line
from autocomp.study.per_example import ExampleScores
from autocomp.study.records import TrialRecord

COUNT = 1000


def candidate(options: int) -> Candidate:
    """Twelve units of so many distinct options, and a dense one."""
    units = {f"u{i}": Option((Step.of("width", keep=i % options),)) for i in range(12)}
    return Candidate.of({**units, "head": Option()})


def trial(
    id: str,
    wrong: int,
    options: int,
    latency: float = 4.0,
    size: int = 30,
    kl: float | None = None,
) -> TrialRecord:
    """A trial with so many wrong answers of `COUNT`."""
    return TrialRecord(
        id, "search", "milp", "complete", candidate(options), quality=1 - wrong / COUNT,
        teacher_kl=kl, measured=Measurement("measured", latency, size, 100),
    )  # fmt: skip


def answers(wrong: int, shift: int = 0) -> np.ndarray:
    """Right but for `wrong` examples from `shift` on."""
    right = np.ones(COUNT)
    right[np.arange(shift, shift + wrong) % COUNT] = 0
    return right


def noise(*trials: TrialRecord, shifts: dict[str, int] | None = None) -> Noise:
    """Trials err from the same example on, unless shifted: then they err on others."""
    scores = {}
    for its in trials:
        wrong = round((1 - (its.quality or 0)) * COUNT)
        scores[its.id] = ExampleScores(answers(wrong, (shifts or {}).get(its.id, 0)), "s")
    return Noise.of({t.id: t.quality or 0.0 for t in trials}, scores)


BEST = trial("best", 100, 11)


def taken(*others: TrialRecord, budget: Budget | None = None, **given: int) -> str:
    """What is taken among `BEST` and others; `given` are shifts, of 20 if not said otherwise."""
    trials = [BEST, *others]
    shifts = {other.id: 20 for other in others} | given
    return choose(trials, budget or Budget(), noise(*trials, shifts=shifts)).record.id


def test_the_simplest_within_noise_is_taken_and_the_best_when_asked() -> None:
    simple, plainer = trial("simple", 103, 4), trial("plainer", 104, 3)
    assert taken(simple) == "simple"
    assert taken(simple, plainer) == "plainer"
    trials = [BEST, simple, plainer]
    known = noise(*trials, shifts={"simple": 20, "plainer": 20})
    assert choose(trials, Budget(), known, plain=True).record is BEST
    assert choose(trials, Budget()).record is BEST, "without per-example scores it is the best"
    choice = choose(trials, Budget(), known)
    assert [record.id for record in choice.finalists] == ["best", "simple", "plainer"]
    assert choice.best is BEST


def test_nothing_but_fewer_distinct_options_is_simpler() -> None:
    assert taken(trial("same", 100, 11, latency=3.9)) == "same"  # as good and cheaper: the best
    assert taken(trial("as-complex", 101, 11, latency=3.0)) == "best"
    assert taken(trial("complex", 101, 12)) == "best"
    assert taken(trial("a", 103, 4), trial("b", 102, 4)) == "b", "of equally simple ones the better"


def test_options_are_counted_by_what_they_do() -> None:
    assert distinct_options(candidate(4)) == 4
    assert distinct_options(Candidate.of({"a": Option(), "b": Option()})) == 0
    int8 = Option((Step.of("gptq", weights=8),))
    pruned = Option((Step.of("heads", keep=3), Step.of("gptq", weights=8)))
    same = Candidate.of({"a": int8, "b": int8, "c": pruned, "d": Option((Step.of("skip"),))})
    assert distinct_options(same) == 3


def test_beyond_one_standard_error_it_stays_the_best() -> None:
    """Four examples that the best answers and the other does not are no luck where none speaks for
    the other; where as many did, they are."""
    nested = trial("nested", 104, 2)
    assert taken(nested, nested=0) == "best"
    trials = [BEST, nested]
    difference = noise(*trials).difference("nested", "best")
    assert difference is not None
    assert -difference.value > difference.standard_error > 0
    assert taken(nested, nested=20) == "nested"


def test_half_a_percent_bounds_the_drop_where_a_standard_error_is_a_lot() -> None:
    far = {"far": 500}
    worse = trial("far", 105, 2)
    trials = [BEST, worse]
    difference = noise(*trials, shifts=far).difference("far", "best")
    assert difference is not None
    assert difference.standard_error > 0.013
    assert taken(worse, far=500) == "best"
    assert taken(trial("far", 104, 2), far=500) == "far"


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({"latency": 4.1, "size": 31}, "simple"),
        ({"latency": 4.3}, "best"),
        ({"size": 40}, "best"),
        ({"latency": 1.0, "size": 10}, "simple"),
    ],
)
def test_it_costs_no_more(costs: dict[str, float], expected: str) -> None:
    assert taken(trial("simple", 102, 2, **costs)) == expected  # type: ignore[arg-type]


def test_memory_is_a_cost_too() -> None:
    simple = trial("simple", 102, 2)
    for memory, expected in ((104, "simple"), (120, "best"), (None, "best")):
        changed = replace(simple, measured=Measurement("measured", 4.0, 30, memory))
        assert taken(changed) == expected
    best = replace(BEST, measured=Measurement("measured", 4.0, 30))
    trials = [best, simple]
    assert choose(trials, Budget(), noise(*trials, shifts={"simple": 20})).record is simple


def closest(*others: TrialRecord, budget: Budget | None = None) -> str:
    """What is taken among others and a best trial of 0.1 nats that does 11 things."""
    trials = [trial("best", 100, 11, kl=0.1), *others]
    shifts = {other.id: 20 for other in others}
    return choose(trials, budget or Budget(), noise(*trials, shifts=shifts)).record.id


def test_among_those_within_noise_the_closest_to_the_teacher_is_taken() -> None:
    near = trial("near", 110, 12, kl=0.05)
    assert closest(near) == "near", "neither better nor simpler"
    assert closest(near, trial("nearer", 112, 12, kl=0.04)) == "nearer"
    assert closest(trial("worse", 200, 12, kl=0.01)) == "best", "the examples tell it apart"
    assert closest(trial("unknown", 100, 12, kl=None)) == "best"
    assert closest(trial("nan", 100, 12, kl=float("nan"))) == "best"


def test_a_simpler_one_diverges_no_further_than_the_closest() -> None:
    near = trial("near", 103, 12, kl=0.05)
    assert closest(near, trial("simple", 103, 3, kl=0.054)) == "simple"
    assert closest(near, trial("simple", 103, 3, kl=0.06)) == "near"


def test_the_closest_may_use_what_the_budget_allows_and_nothing_else() -> None:
    near = trial("near", 103, 12, latency=5.0, kl=0.05)
    assert closest(near) == "best"
    assert closest(near, budget=Budget(latency_ms=6.0)) == "near"
    assert closest(replace(near, measured=Measurement("measured", 5.0, 40))) == "best"


def test_the_budget_comes_first() -> None:
    simple = trial("simple", 102, 2, latency=4.1)
    assert taken(simple, budget=Budget(latency_ms=4.0)) == "best"
    assert taken(simple, budget=Budget(quality=0.9)) == "best"
    assert taken(simple, budget=Budget(quality=0.898)) == "simple"
    with pytest.raises(NothingFitsError):
        taken(simple, budget=Budget(latency_ms=1.0))


def test_a_trial_that_does_not_rank_is_never_taken() -> None:
    simple = trial("simple", 100, 2)
    for broken in (
        replace(simple, state="failed"),
        replace(simple, quality=float("nan")),
        replace(simple, measured=None),
        replace(simple, measured=Measurement("measured", float("nan"), 30)),
    ):
        trials = [BEST, broken]
        scores = {t.id: ExampleScores(answers(100), "s") for t in trials}
        known = Noise.of({"best": 0.9, "simple": 0.9}, scores)
        assert choose(trials, Budget(), known).record is BEST
        assert choose(trials, Budget(), known).finalists == (BEST,)


def test_the_front_says_what_was_chosen_among() -> None:
    simple, poor = trial("simple", 103, 4), trial("poor", 300, 1)
    trials = [BEST, simple, poor]
    known = noise(*trials, shifts={"simple": 20})
    view = front_json("s", {}, Budget(), trials, noise=known)
    json.dumps(view, allow_nan=False)
    assert view["chosen"] == "simple"
    selection = view["selection"]
    assert {k: selection[k] for k in ("chosen", "best", "examples")} == {
        "chosen": "simple",
        "best": "best",
        "examples": COUNT,
    }
    best, row = selection["finalists"]
    assert (best["id"], best["difference"], best["ratio_low"]) == ("best", None, None)
    assert (row["id"], row["distinct_options"], best["distinct_options"]) == ("simple", 4, 11)
    assert row["difference"] == pytest.approx(-0.003)
    assert row["difference_low"] < row["difference"] < 0 < row["difference_high"]
    assert row["ratio"] == pytest.approx(0.897 / 0.9)
    assert row["quality_low"] < row["quality"] < row["quality_high"]
    by_id = {each["id"]: each for each in view["trials"]}
    assert by_id["poor"]["quality_low"] < 0.7 < by_id["poor"]["quality_high"]
    assert by_id["best"]["distinct_options"] == 11
    plain = front_json("s", {}, Budget(), trials)
    assert (plain["chosen"], plain["selection"]) == ("best", None)
    assert plain["trials"][0]["quality_low"] is plain["trials"][0]["quality_high"] is None
    assert front_json("s", {}, Budget(latency_ms=1.0), trials, noise=known)["selection"] is None


def test_the_report_s_ratio_is_paired_with_dense() -> None:
    dense = trial("dense", 90, 1)
    reports = {
        "dense": {"quality": 0.91, "teacher_quality": 0.91},
        "best": {"quality": 0.9, "teacher_quality": 0.91},
    }
    known = noise(dense, BEST)
    view = front_json("s", {}, Budget(latency_ms=4.0), [BEST], reports=reports, report_noise=known)
    report = view["report"]
    assert report["ratio"] == pytest.approx(0.9 / 0.91)
    assert report["ratio_low"] < report["ratio"] < report["ratio_high"] < 1
    assert report["examples"] == COUNT
    assert report["ratio_high"] - report["ratio_low"] < 0.02, "paired: ten examples differ"


def test_what_costs_least_is_taken_when_asked() -> None:
    fast, small = trial("fast", 150, 9, latency=1.0), trial("small", 160, 9, size=5)
    wrong = trial("wrong", 400, 1, latency=0.1, size=1)
    trials, floor = [BEST, fast, small, wrong], Budget(quality=0.8)
    known = noise(*trials)
    chosen = choose(trials, floor, known, least="latency")
    assert (chosen.record, chosen.best, chosen.fitting) == (fast, BEST, 3)
    data = chosen.to_json()
    assert data is not None
    assert (data["chosen"], data["least"]) == ("fast", "latency")
    assert selection_line(data, Scale()) == (
        "fast has the lowest latency of the 3 that fit; best has the highest quality"
    )
    assert choose(trials, floor, least="size").record is small
    twin = trial("twin", 140, 9, latency=1.0)
    assert choose([*trials, twin], floor, least="latency").record is twin, "the better of two"
    with pytest.raises(NothingFitsError):
        choose(trials, Budget(quality=0.95), least="latency")
    only = choose(trials, Budget(latency_ms=0.5), known, least="size").to_json()
    assert only is not None
    assert selection_line(only, Scale()) == "wrong is the only one that fits"
