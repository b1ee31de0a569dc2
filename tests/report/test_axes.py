"""Axes of the plots."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.report.axes import cost_range, linear_ticks, log_ticks, quality_range

positive = st.floats(1e-3, 1e9)


@given(st.lists(positive, min_size=1, max_size=20))
def test_a_cost_axis_holds_every_value(values: list[float]) -> None:
    axis = cost_range(values)
    assert axis.low < min(values)
    assert max(values) < axis.high


def test_one_ruined_model_does_not_squeeze_the_others() -> None:
    good = [0.90, 0.89, 0.905, 0.88, 0.895]
    axis = quality_range([*good, 0.2])
    assert axis.clipped
    assert axis.low < min(good)
    assert axis.low > 0.8


def test_even_values_are_all_inside() -> None:
    axis = quality_range([0.1, 0.2, 0.3, 0.4])
    assert not axis.clipped
    assert axis.low < 0.1 < 0.4 < axis.high


def test_equal_values_still_have_a_range() -> None:
    axis = quality_range([0.5, 0.5])
    assert axis.low < 0.5 < axis.high


def test_most_models_equal_and_one_ruined() -> None:
    axis = quality_range([0.5, 0.5, 0.5, 0.1])
    assert axis.low <= 0.1


@given(positive, st.floats(1.01, 1e6))
def test_log_ticks_lie_inside_and_ascend(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * ratio for tick in ticks)


def test_log_ticks_of_a_decade() -> None:
    assert log_ticks(0.9, 11.0, most=4) == pytest.approx([1, 2, 5, 10])


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_linear_ticks_are_evenly_spaced(low: float, width: float) -> None:
    ticks = linear_ticks(low, low + width)
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert 2 <= len(ticks) <= 7
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-4) for gap in gaps)
