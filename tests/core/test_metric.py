"""Quality on the scale that a person reads: itself, or a perplexity."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.errors import UserError
from autocomp.core.metric import Floor, Scale, floor_problem, parse_floor

qualities = st.floats(1e-6, 1.0, exclude_max=True)


def perplexity(quality: float) -> tuple[dict[str, object], float]:
    return {"name": "perplexity", "value": 1 / quality}, quality


def test_a_perplexity_is_the_reciprocal() -> None:
    scale = Scale.of([perplexity(0.02), ({}, 0.5), perplexity(0.018)])
    assert scale == Scale("perplexity", True)
    assert scale.value(0.02) == pytest.approx(50)
    assert scale.floor(0.02) == "perplexity ≤ 50"
    rounded = {"name": "perplexity", "value": 55.61}  # as written in a ledger by hand
    assert Scale.of([(rounded, 1 / 55.6094)]) == scale


def test_the_ends_of_an_interval_turn_with_the_sense() -> None:
    assert Scale("perplexity", True).ends(0.02, 0.025) == pytest.approx((40, 50))
    assert Scale().ends(0.8, 0.9) == (0.8, 0.9)


@pytest.mark.parametrize(
    "figures",
    [
        [],
        [({}, 0.9)],
        [({"name": "accuracy", "value": 0.9}, 0.9)],
        [({"name": "accuracy", "value": 1.0}, 1.0)],
        [({"name": "error", "value": 0.1}, 0.9)],
        [({"name": "perplexity", "value": None}, 0.9)],
        [perplexity(0.02), ({"name": "accuracy", "value": 0.9}, 0.9)],
        [perplexity(0.02), ({"name": "bits", "value": 50.0}, 0.02)],
    ],
)
def test_anything_else_is_shown_as_quality(figures: list[tuple[dict[str, object], float]]) -> None:
    assert Scale.of(figures) == Scale()
    assert Scale().floor(0.9) == "quality ≥ 0.9"


@given(qualities, qualities)
def test_better_is_above_on_every_scale(one: float, other: float) -> None:
    for scale in (Scale(), Scale("perplexity", True)):
        heights = scale.height(one), scale.height(other)
        assert (heights[0] > heights[1]) == (one > other) or math.isclose(one, other)
    assert math.isfinite(Scale("perplexity", True).height(0.0))
    assert Scale("perplexity", True).value(0.0) == math.inf


@given(st.floats(1e-9, 1.0))
def test_a_floor_that_is_written_is_met(quality: float) -> None:
    for scale in (Scale(), Scale("perplexity", True), Scale("bits", True)):
        floor = parse_floor(scale.written(quality)).resolve(None, scale)
        assert floor <= quality * (1 + 1e-12)
        assert floor == pytest.approx(quality, rel=2e-3)
    assert Scale("perplexity", True).written(1 / 56) == "perplexity 56"


@pytest.mark.parametrize("quality", [1e-9, 0.02, 0.9, 1.0])
def test_floors_that_can_be_met(quality: float) -> None:
    assert floor_problem(quality) is None


def test_floors_that_cannot_say_what_was_meant() -> None:
    assert "an accuracy of 97% is 0.97" in str(floor_problem(97))
    assert "97% of dense's is '97%'" in str(floor_problem(97))
    assert "write 'perplexity 97' for one of 97 at most" in str(floor_problem(97))
    assert "accuracy" not in str(floor_problem(250.0))
    for quality in (0.0, -0.5, math.nan, math.inf):
        assert str(floor_problem(quality)).endswith("Leave it out to have none")


@pytest.mark.parametrize(
    ("text", "quality"),
    [
        (0.9, 0.9),
        ("0.9", 0.9),
        ("1", 1.0),
        ("98%", 0.98 * 0.025),
        (" 102.5 % ", 1.025 * 0.025),
        ("perplexity 50", 0.02),
        ("perplexity  5e1", 0.02),
    ],
)
def test_a_floor_as_a_person_writes_it(text: str | float, quality: float) -> None:
    assert parse_floor(text).resolve(0.025, Scale("perplexity", True)) == pytest.approx(quality)


@pytest.mark.parametrize(
    "text",
    ["", "good", "-1", "1.2.3", "0%", "perplexity", "perplexity 0", "perplexity 50%", "accuracy 1"],
)
def test_what_is_no_floor(text: str) -> None:
    with pytest.raises(UserError, match=r"'98%' of dense, or of a language model 'perplexity 50'"):
        parse_floor(text)


def test_a_floor_needs_what_it_refers_to() -> None:
    with pytest.raises(UserError, match=r"this task is not scored by perplexity\. Write 0\.9"):
        Floor(0.02, metric="perplexity").resolve(0.9, Scale())
    with pytest.raises(ValueError, match="dense quality was not measured"):
        Floor(0.98, relative=True).resolve(None, Scale())
    with pytest.raises(UserError, match=r"an accuracy of 97% is 0\.97"):
        parse_floor("97")
