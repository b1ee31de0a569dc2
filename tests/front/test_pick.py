"""The front and the choice under a budget, with two bugs of other systems as regressions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import InfeasibleError
from autocomp.core.measurement import Measurement
from autocomp.core.metric import Scale, parse_floor
from autocomp.core.quantities import parse_limit
from autocomp.front import NothingFitsError, front, front_json, pick, study_hypervolume
from autocomp.study.records import TrialRecord


def record(
    id: str, quality: float | None, latency: float | None, size: int | None, **changes: Any
) -> TrialRecord:
    made = TrialRecord(
        id=id,
        kind="search",
        proposed_by="milp",
        state="complete",
        candidate=Candidate.of({"head": Option((Step.of("rtn", weights=8, name=id),))}),
        quality=quality,
        measured=Measurement("measured", latency, size),
        estimated=Measurement("estimated", 1.0, 10),
    )
    return replace(made, **changes)


DENSE = record("dense", 0.90, 10.0, 100, kind="dense", proposed_by="baseline")
GOOD = record("good", 0.88, 4.0, 30)
SMALL = record("small", 0.80, 3.0, 20)
WORSE = record("worse", 0.79, 4.5, 35)


def test_front_is_the_non_dominated_measured_trials() -> None:
    assert [r.id for r in front([DENSE, GOOD, WORSE, SMALL])] == ["dense", "good", "small"]


@pytest.mark.parametrize(
    "broken",
    [
        record("x", 0.99, None, 1),
        record("x", 0.99, math.nan, 1),
        record("x", 0.99, 0.1, None),
        record("x", None, 0.1, 1),
        record("x", math.nan, 0.1, 1),
        record("x", math.inf, 0.1, 1),
        record("x", 0.99, 0.1, 1, state="failed"),
        record("x", 0.99, 0.1, 1, state="pruned"),
        record("x", 0.99, 0.1, 1, measured=None),
        record("x", 0.99, 0.1, 1, measured=Measurement("estimated", 0.1, 1)),
    ],
)
def test_a_trial_that_lacks_a_figure_never_ranks(broken: TrialRecord) -> None:
    """Elsewhere a trial without its lower-is-better metric ranked best."""
    assert [r.id for r in front([broken, GOOD])] == ["good"]
    assert pick([broken, GOOD], Budget(latency_ms=5.0)).id == "good"
    assert pick([broken, GOOD], Budget()).id == "good"
    with pytest.raises(NothingFitsError):
        pick([broken], Budget())


def test_absolute_limits_do_not_vanish() -> None:
    """Elsewhere every goal vanished silently when all of them were absolute thresholds."""
    budget = Budget(latency_ms=3.5, size_bytes=25, quality=0.75)
    assert pick([DENSE, GOOD, SMALL], budget).id == "small"
    with pytest.raises(NothingFitsError):
        pick([DENSE, GOOD, WORSE], budget)
    for alone in (Budget(latency_ms=3.5), Budget(size_bytes=25)):
        assert pick([DENSE, GOOD, SMALL], alone).id == "small"
    assert pick([DENSE, GOOD, SMALL], Budget(quality=0.89)).id == "dense"


def test_an_unmeasured_limited_cost_is_infeasible() -> None:
    with pytest.raises(NothingFitsError, match="peak memory was not measured"):
        pick([GOOD], Budget(peak_memory_bytes=1e9))


def test_pick_prefers_quality_then_the_cheapest() -> None:
    tie = record("tie", 0.88, 3.9, 31)
    assert pick([GOOD, tie, SMALL], Budget(latency_ms=5.0)).id == "tie"
    assert pick([GOOD, replace(GOOD, id="aaa")], Budget()).id == "aaa"


def test_a_limit_is_met_when_equal() -> None:
    assert pick([GOOD], Budget(latency_ms=4.0, size_bytes=30)).id == "good"


def test_the_limit_that_is_suggested_is_met() -> None:
    assert GOOD.measured is not None
    for latency_ms in (3.999, 4.0, 4.0049, 0.76721):
        record = replace(GOOD, measured=replace(GOOD.measured, latency_ms=latency_ms))
        with pytest.raises(NothingFitsError) as caught:
            pick([record], Budget(latency_ms=0.5))
        suggested = str(caught.value).partition("raise the limit to latency ")[2].partition(",")[0]
        limit_ms = parse_limit(suggested, "latency").value
        assert latency_ms <= limit_ms < 1.01 * latency_ms
        assert pick([record], Budget(latency_ms=limit_ms)) is record
        assert caught.value.details() == {"nearest": "good", "binding": "latency_ms"}


def test_nothing_fits_names_the_nearest_and_what_binds() -> None:
    with pytest.raises(NothingFitsError) as caught:
        pick([DENSE, GOOD, SMALL], Budget(latency_ms=2.0, size_bytes=25))
    assert caught.value.nearest is SMALL
    assert caught.value.binding == "latency_ms"
    assert "small" in str(caught.value)
    assert "50.0% over" in str(caught.value)
    assert "raise the limit to latency 3 ms" in str(caught.value)
    assert isinstance(caught.value, InfeasibleError)
    assert caught.value.exit_status == 3


def test_the_quality_floor_can_bind() -> None:
    with pytest.raises(NothingFitsError, match=r"move the floor on quality to 0\.9,") as caught:
        pick([DENSE, GOOD], Budget(quality=0.99))
    assert "No measured trial meets quality ≥ 0.99." in str(caught.value)
    assert pick([DENSE, GOOD], Budget(quality=0.9)) is DENSE


def test_a_language_model_is_told_of_in_perplexity() -> None:
    def of(id: str, perplexity: float, latency: float) -> TrialRecord:
        metric = {"name": "perplexity", "value": perplexity}
        return record(id, 1 / perplexity, latency, 30, metric=metric)

    trials = [of("dense", 50.0, 10.0), of("near", 56.0, 4.0), of("fast", 80.0, 3.0)]
    with pytest.raises(NothingFitsError) as caught:
        pick(trials, Budget(latency_ms=5.0, quality=1 / 55))
    message = str(caught.value)
    assert "No measured trial meets latency ≤ 5 ms, perplexity ≤ 55. Nearest: near" in message
    assert "(perplexity 56, latency 4 ms" in message
    assert "perplexity ≤ 55 binds" in message
    named = re.search(r"move the floor on quality to (perplexity [0-9.]+),", message)
    assert named is not None
    floor = parse_floor(named[1]).resolve(None, Scale("perplexity", True))
    assert pick(trials, Budget(latency_ms=5.0, quality=floor)).id == "near"


def test_hypervolume_is_normalised_by_dense() -> None:
    assert study_hypervolume([DENSE], DENSE) == pytest.approx(0.0)
    expected = 0.88 * (1 - 0.4) * (1 - 0.3)
    assert study_hypervolume([DENSE, GOOD], DENSE) == pytest.approx(expected)
    assert study_hypervolume([GOOD], None) is None


def test_front_json_has_exactly_the_stable_shape() -> None:
    broken = record("nan", math.nan, math.nan, 1, state="failed")
    budget = Budget(latency_ms=5.0, size_bytes=50)
    data = front_json("runs/x", {"name": "t"}, budget, [DENSE, GOOD, broken])
    json.dumps(data, allow_nan=False)
    keys = "study, target, budget, dense, chosen, nearest, hypervolume, report, trials, selection"
    assert ", ".join(data) == keys
    assert data["budget"] == {
        "latency_ms": 5.0,
        "size_bytes": 50,
        "peak_memory_bytes": None,
        "quality": None,
    }
    assert (data["dense"], data["chosen"], data["nearest"]) == ("dense", "good", None)
    good = data["trials"][1]
    assert list(good) == [
        "id",
        "kind",
        "runtime",
        "proposed_by",
        "state",
        "on_front",
        "feasible",
        "quality",
        "metric",
        "teacher_kl",
        "latency_ms",
        "size_bytes",
        "peak_memory_bytes",
        "latency_clock",
        "latency_wall_ms",
        "measured",
        "estimated",
        "candidate",
        "quality_low",
        "quality_high",
        "distinct_options",
        "undone",
    ]
    assert good["on_front"] is good["feasible"] is good["measured"] is True
    assert good["latency_ms"] == 4.0
    assert good["estimated"] == {"latency_ms": 1.0, "size_bytes": 10, "peak_memory_bytes": None}
    assert data["trials"][0]["feasible"] is False
    nan = data["trials"][2]
    assert nan["measured"] is nan["feasible"] is nan["on_front"] is False
    assert nan["latency_ms"] is None
    assert nan["size_bytes"] is None


def test_front_json_without_a_feasible_trial_chooses_none() -> None:
    data = front_json("s", {}, Budget(latency_ms=0.1), [DENSE])
    assert data["chosen"] is None
    assert data["nearest"] == {"id": "dense", "binding": "latency_ms"}
    empty = front_json("s", {}, Budget(), [])
    assert (empty["dense"], empty["nearest"]) == (None, None)


def test_the_floor_is_part_of_the_budget() -> None:
    data = front_json("s", {}, Budget(quality=0.85), [DENSE, GOOD, SMALL])
    assert data["budget"]["quality"] == 0.85
    assert {t["id"]: t["feasible"] for t in data["trials"]}["small"] is False
    data = front_json("s", {}, Budget(quality=0.95), [DENSE, GOOD, SMALL])
    assert data["nearest"] == {"id": "dense", "binding": "quality"}


@pytest.mark.parametrize(("threads", "clock"), [(1, "processor"), (4, "wall")])
def test_a_latency_says_its_clock(threads: int, clock: str) -> None:
    timed = replace(GOOD, measured=Measurement("measured", 4.0, 30, latency_wall_ms=4.4))
    target = {"name": "t", "workload": {"threads": threads}}
    failed = record("x", None, None, None, state="failed", measured=None)
    rows = front_json("s", target, Budget(), [timed, failed])["trials"]
    assert [row["latency_clock"] for row in rows] == [clock, None]
    assert [row["latency_wall_ms"] for row in rows] == [4.4, None]


def test_the_report_of_the_chosen_trial_is_beside_the_teacher() -> None:
    reports = {
        "dense": {"quality": 0.9, "teacher_quality": 0.9},
        "good": {
            "quality": 0.018,
            "metric": {"name": "perplexity", "value": 55.6},
            "teacher_quality": 0.02,
            "teacher_metric": {"name": "perplexity", "value": 50.0},
        },
    }
    data = front_json("s", {}, Budget(latency_ms=5.0), [DENSE, GOOD], reports=reports)
    assert data["report"] == {
        "id": "good",
        "quality": 0.018,
        "teacher_quality": 0.02,
        "ratio": pytest.approx(0.9),
        "metric": {"name": "perplexity", "value": 55.6},
        "teacher_metric": {"name": "perplexity", "value": 50.0},
        "candidates": 1,
        "ratio_low": None,
        "ratio_high": None,
        "examples": None,
    }
    earlier = {"small": {"quality": 0.01, "teacher_quality": 0.02}, **reports}
    again = front_json("s", {}, Budget(latency_ms=5.0), [DENSE, GOOD], reports=earlier)
    assert again["report"]["candidates"] == 2
    forked = {"good@old-1": earlier["small"], "small@old-1": earlier["small"], **reports}
    again = front_json("s", {}, Budget(latency_ms=5.0), [DENSE, GOOD], reports=forked)
    assert again["report"]["candidates"] == 2
    assert front_json("s", {}, Budget(latency_ms=5.0), [DENSE, GOOD])["report"] is None
    assert front_json("s", {}, Budget(latency_ms=0.1), [DENSE], reports=reports)["report"] is None


def test_runtimes_share_a_front_and_the_first_is_the_reference() -> None:
    def on(runtime: str, made: TrialRecord) -> TrialRecord:
        return replace(made, candidate=replace(made.candidate, runtime=runtime))

    other = on("b", record("dense-b", 0.90, 6.0, 110, kind="dense", proposed_by="baseline"))
    rows = [other, on("a", DENSE), on("a", GOOD), on("b", SMALL)]
    view = front_json("s", {"name": "auto-cpu"}, Budget(latency_ms=3.5), rows)
    assert view["dense"] == "dense"
    assert view["chosen"] == "small"
    assert {t["id"]: t["runtime"] for t in view["trials"]} == {
        "dense-b": "b",
        "dense": "a",
        "good": "a",
        "small": "b",
    }
    assert all(t["on_front"] for t in view["trials"])
    assert view["hypervolume"] == pytest.approx(study_hypervolume(rows, rows[1]))
    single = front_json("s", {"name": "a-cpu", "runtime": "a"}, Budget(), [DENSE, GOOD])
    assert {t["runtime"] for t in single["trials"]} == {"a"}
