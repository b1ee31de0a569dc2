"""Dominance, hypervolume and crowding against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from autocomp.front.dominance import crowding, hypervolume, non_dominated


def _brute_front(points: np.ndarray) -> list[bool]:
    return [
        not any((q <= p).all() and (q < p).any() for j, q in enumerate(points) if j != i)
        for i, p in enumerate(points)
    ]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_non_dominated_matches_brute_force(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    points = rng.integers(0, 6, size=(80, dimensions)).astype(float)
    assert non_dominated(points.tolist(), ["min"] * dimensions) == _brute_front(points)


def test_senses_are_respected() -> None:
    points = [[0.9, 5.0], [0.8, 5.0], [0.8, 4.0], [0.9, 6.0]]
    assert non_dominated(points, ["max", "min"]) == [True, False, True, False]


def test_equal_points_stay_together() -> None:
    assert non_dominated([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]], ["min", "min"]) == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_non_finite_point_never_ranks_and_beats_nothing(bad: float | None) -> None:
    assert non_dominated([[bad, 0.0], [1.0, 1.0]], ["min", "min"]) == [False, True]
    assert hypervolume([[bad, 0.0], [1.0, 1.0]], [2.0, 2.0]) == pytest.approx(1.0)
    assert crowding([[bad, 0.0], [1.0, 1.0]])[0] == 0.0


def test_wrong_arity_and_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values for 1"):
        non_dominated([[1.0, 2.0]], ["min"])
    with pytest.raises(ValueError, match="'max' or 'min'"):
        non_dominated([[1.0]], ["less"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="finite"):
        hypervolume([[1.0]], [math.inf])


def _grid_volume(points: np.ndarray, corner: np.ndarray) -> float:
    """Inclusion by elementary cells: exact for any point set, cost exponential in dimensions."""
    axes = [np.unique(np.append(points[:, d], corner[d])) for d in range(len(corner))]
    volume = 0.0
    for cell in itertools.product(*(range(len(axis) - 1) for axis in axes)):
        low = np.array([axes[d][i] for d, i in enumerate(cell)])
        high = np.array([axes[d][i + 1] for d, i in enumerate(cell)])
        if (high <= corner).all() and (points <= low).all(axis=1).any():
            volume += float(np.prod(high - low))
    return volume


@pytest.mark.parametrize(("dimensions", "count"), [(1, 6), (2, 12), (3, 10), (4, 7)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hypervolume_matches_a_cell_sum(dimensions: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.random((count, dimensions)).round(1)  # rounding makes ties
    corner = np.full(dimensions, 0.85)
    expected = _grid_volume(points, corner)
    assert hypervolume(points.tolist(), corner.tolist()) == pytest.approx(expected, abs=1e-12)


def test_hypervolume_with_senses_and_outside_points() -> None:
    points = [[0.9, 0.5], [0.95, 1.2], [-0.1, 0.1]]
    assert hypervolume(points, [0.0, 1.0], ["max", "min"]) == pytest.approx(0.45)
    assert hypervolume([], [1.0, 1.0]) == 0.0


def test_hypervolume_of_a_hundred_points_in_four_dimensions_agrees_with_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((100, 4))
    samples = rng.random((40_000, 4))
    covered = np.zeros(len(samples), dtype=bool)
    for point in points:
        covered |= (samples >= point).all(axis=1)
    assert hypervolume(points.tolist(), [1.0] * 4) == pytest.approx(covered.mean(), abs=0.01)


def test_crowding_by_hand() -> None:
    distance = crowding([[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0]])
    assert distance[0] == distance[3] == math.inf
    assert distance[1] == pytest.approx(3 / 4 + 3 / 4)
    assert distance[2] == pytest.approx(3 / 4 + 3 / 4)
    assert crowding([]) == []
