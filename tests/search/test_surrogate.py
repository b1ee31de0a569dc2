"""The surrogate against the regression it stands for, and on losses whose units interact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autocomp.search.space import Vector
from autocomp.search.surrogate import RIDGE, Surrogate

UNITS, OPTIONS = 5, 3


class Quadratic:
    """Every option moves the output by a vector of its own; the loss is the squared sum."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        common = rng.normal(size=(UNITS, 1, 6))  # options of a unit err alike, by how much differs
        size = np.arange(OPTIONS)[None, :, None] * rng.uniform(0.5, 2.0, size=(UNITS, 1, 1))
        self.moves = size * (common + 0.1 * rng.normal(size=(UNITS, OPTIONS, 6)))
        self.weights = list((self.moves**2).sum(-1))
        every = itertools.product(range(OPTIONS), repeat=UNITS)
        self.vectors: list[Vector] = [vector for vector in every if any(vector)]
        rng.shuffle(self.vectors)

    def loss(self, vector: Vector) -> float:
        return float((self.moves[range(UNITS), list(vector)].sum(0) ** 2).sum())


def spearman(left: list[float], right: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_how_units_interact(seed: int) -> None:
    problem = Quadratic(seed)
    known = [(vector, problem.loss(vector)) for vector in problem.vectors[:60]]
    unseen = problem.vectors[60:]
    truth = [problem.loss(vector) for vector in unseen]
    additive = spearman(list(Surrogate(problem.weights).predict(unseen)), truth)
    learnt = spearman(list(Surrogate(problem.weights, known).predict(unseen)), truth)
    assert learnt > 0.995
    assert additive < 0.99


def test_it_is_ridge_regression_over_every_pair_of_units() -> None:
    problem = Quadratic(3)
    vectors = problem.vectors[:30]
    loss = np.array([problem.loss(vector) for vector in vectors])
    chosen = np.stack(
        [problem.weights[unit][[v[unit] for v in problem.vectors]] for unit in range(UNITS)], 1
    )
    additive = chosen.sum(1)
    pairs = np.stack(
        [
            2 * np.sqrt(chosen[:, i] * chosen[:, j])
            for i, j in itertools.combinations(range(UNITS), 2)
        ],
        1,
    )
    features = pairs[:30] / loss[:, None]
    target = (loss - additive[:30]) / loss
    correlation = np.linalg.solve(
        features.T @ features + RIDGE * np.eye(features.shape[1]), features.T @ target
    )
    expected = np.maximum(additive + pairs @ correlation, 1e-6)
    found = Surrogate(problem.weights, list(zip(vectors, loss, strict=True))).predict(
        problem.vectors
    )
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_without_anything_known_it_is_the_sum_of_the_scores() -> None:
    weights = [np.array([0.0, 0.5]), np.array([0.0, np.inf]), np.array([-0.1, 2.0])]
    found = Surrogate(weights).predict([(1, 0, 1), (0, 0, 0), (1, 1, 0)])
    np.testing.assert_allclose(found, [2.5, 1e-6, 0.5])
