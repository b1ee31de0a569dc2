"""Costs that are not linear: an option that makes all later units cheaper, against enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from search_problems import ffn

from autocomp.core.candidate import Option, Step
from autocomp.core.measurement import Measurement
from autocomp.search.costs import Costs
from autocomp.search.milp import seeds, solve
from autocomp.search.repair import Repair
from autocomp.search.space import Space

DENSE, SKIP = Option(), Option((Step.of("skip"),))
MERGE = Option((Step.of("tome", ratio=0.25),))
HALVE = Option((Step.of("token_prune", ratio=0.5),))
LEFT = {MERGE.key: 0.75, HALVE.key: 0.5}
UNITS = 6


class Shrinking:
    """Every unit costs 1 ms times the share of tokens it sees; terms know of one merge at most."""

    base_latency_ms = 0.2
    base_size_bytes = 0.0
    base_peak_memory_bytes = None

    def peak_memory_bytes(self, unit: str, option: Option) -> float:
        return 0.0

    def latency_ms(self, unit: str, option: Option) -> float:
        behind = UNITS - 1 - int(unit.split(".")[1])
        return (option != SKIP) - 0.8 * behind * (1 - LEFT.get(option.key, 1.0))

    def size_bytes(self, unit: str, option: Option) -> float:
        return 10.0

    def predict(self, options: Mapping[str, Option]) -> Measurement:
        share, total = 1.0, self.base_latency_ms
        for option in options.values():
            total += share * (option != SKIP)
            share *= LEFT.get(option.key, 1.0)
        return Measurement("estimated", total, 60)

    def interaction_ms(self, options: Mapping[str, Option]) -> float:
        linear = sum(self.latency_ms(unit, option) for unit, option in options.items())
        return (self.predict(options).latency_ms or 0.0) - self.base_latency_ms - linear


@pytest.fixture(scope="module")
def space() -> Space:
    units = [ffn(i) for i in range(UNITS)]
    return Space(units, {unit.name: (DENSE, MERGE, HALVE, SKIP) for unit in units})


@pytest.fixture(scope="module")
def weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.array([0.0, 0.1, 0.3, 0.8]) * rng.uniform(0.5, 1.5) for _ in range(UNITS)]


def _exact(space: Space, vector: tuple[int, ...]) -> float:
    value = Shrinking().predict(space.decode(vector).by_unit).latency_ms
    assert value is not None
    return value


def test_totals_are_what_is_predicted(space: Space) -> None:
    costs = Costs(space, Shrinking())
    assert not costs.linear
    rng = np.random.default_rng(1)
    for _ in range(50):
        vector = space.random(rng)
        assert costs.total("latency_ms", vector) == pytest.approx(_exact(space, vector))


@pytest.mark.parametrize("limit", [4.5, 3.0, 2.0, 1.5])
def test_solutions_are_within_the_limits_and_near_the_best(
    space: Space, weights: list[np.ndarray], limit: float
) -> None:
    costs = Costs(space, Shrinking())
    found = solve(weights, costs, {"latency_ms": limit})
    assert found is not None
    assert _exact(space, found) <= limit * (1 + 1e-6)
    values = sorted(
        sum(weights[u][o] for u, o in enumerate(vector))
        for vector in itertools.product(range(4), repeat=UNITS)
        if _exact(space, vector) <= limit
    )
    value = sum(weights[u][o] for u, o in enumerate(found))
    assert value <= values[len(values) // 10]
    for vector in seeds(weights, costs, {"latency_ms": limit}, 4, 0):
        assert _exact(space, vector) <= limit * (1 + 1e-6)


@pytest.mark.parametrize("limit", [4.5, 2.0])
def test_repaired_children_are_within_the_limits(
    space: Space, weights: list[np.ndarray], limit: float
) -> None:
    costs = Costs(space, Shrinking())
    repair = Repair(weights, costs, {"latency_ms": limit})
    rng = np.random.default_rng(2)
    made = [repair.random(rng) for _ in range(20)]
    made += [repair.mutate(vector, rng) for vector in made if vector is not None]
    found = [vector for vector in made if vector is not None]
    assert len(found) > 30
    for vector in found:
        assert _exact(space, vector) <= limit * (1 + 1e-6)
        assert repair.within(vector)
