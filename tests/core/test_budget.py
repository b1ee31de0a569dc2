"""Budgets: limits met or not, unmeasured infeasible, relative limits resolved against dense."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.budget import Budget, RelativeBudget
from autocomp.core.measurement import Measurement
from autocomp.core.metric import parse_floor
from autocomp.core.quantities import parse_limit

COSTS = ("latency_ms", "size_bytes", "peak_memory_bytes")


def cost(latency_ms=None, size_bytes=None, peak_memory_bytes=None):
    return Measurement("measured", latency_ms, size_bytes, peak_memory_bytes)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_feasible_exactly_up_to_the_limit(limit, value):
    budget = Budget(latency_ms=limit)
    assert budget.feasible(cost(latency_ms=value)) == (value <= limit)
    excess = budget.excess(cost(latency_ms=value))
    assert excess == {"latency_ms": pytest.approx((value - limit) / limit, abs=1e-9)}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("value", [None, math.nan])
def test_unmeasured_is_infeasible(name, value):
    budget = Budget(**{name: 10.0})
    assert budget.excess(cost(**{name: value})) == {name: math.inf}
    assert not budget.feasible(cost(**{name: value}))
    assert budget.feasible(cost(**{name: 10}))


@pytest.mark.parametrize(
    ("quality", "excess"), [(None, math.inf), (math.nan, math.inf), (0.81, 0.1), (0.945, -0.05)]
)
def test_quality_is_a_floor(quality, excess):
    budget = Budget(quality=0.9)
    assert budget.excess(cost(), quality) == {"quality": pytest.approx(excess)}
    assert budget.feasible(cost(), quality) == (excess <= 0)


def test_no_limit_is_met_by_anything():
    assert Budget().feasible(cost())
    assert Budget().excess(cost(), None) == {}
    assert Budget().describe() == "no limit"


def test_relative_limits_refer_to_dense():
    written = RelativeBudget(
        latency=parse_limit("20%", "latency"),
        size=parse_limit("10 MB", "size"),
        peak_memory=parse_limit("50%", "peak_memory"),
        quality=parse_floor("98%"),
    )
    budget = written.resolve(cost(6.5, 91_600_000, 300_000_000), 0.9)
    assert budget.to_json() == {
        "latency_ms": pytest.approx(1.3),
        "size_bytes": 10_000_000,
        "peak_memory_bytes": 150_000_000,
        "quality": pytest.approx(0.882),
    }
    assert budget.describe() == (
        "latency ≤ 1.3 ms, size ≤ 10 MB, peak memory ≤ 150 MB, quality ≥ 0.882"
    )


def test_a_relative_limit_needs_the_dense_figure():
    relative = RelativeBudget(latency=parse_limit("20%", "latency"))
    with pytest.raises(ValueError, match="dense latency was not measured"):
        relative.resolve(cost(size_bytes=1))
    absolute = RelativeBudget(latency=parse_limit("2 ms", "latency"))
    assert absolute.resolve(cost()) == Budget(latency_ms=2.0)


def test_measurement_round_trip():
    measured = Measurement("measured", 1.5, 10, None, 1.7, 0.02, "cpu-x")
    assert Measurement.from_json(measured.to_json()) == measured
