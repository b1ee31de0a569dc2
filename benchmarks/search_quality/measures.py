"""What is made of a run: evaluations to a target, the best so far, distance to the true front."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles

import numpy as np

from benchmarks.search_quality.problem import Evaluated

Point = Sequence[float]


def evaluations_until(history: Sequence[Evaluated], target: float) -> int | None:
    """How many evaluations it took to a KL of at most `target` within the limits; `None`: never."""
    for count, one in enumerate(history, 1):
        if one.fits and one.kl <= target:
            return count
    return None


def best_after(history: Sequence[Evaluated], evaluations: int) -> float | None:
    """The least KL within the limits among the first evaluations; `None` where nothing met them."""
    return min((one.kl for one in history[:evaluations] if one.fits), default=None)


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = quantiles(values, n=4, method="inclusive")
    return low, median, high


def igd_plus(points: Sequence[Point], front: Sequence[Point]) -> float:
    """IGD+ of `points` (Ishibuchi et al., 2015): 0 where they equal or beat the whole front.

    Mean over the front's z of the least over a of ‖max(a − z, 0)‖, everything to be minimised.

    Args:
        points: N × M, at least one.
        front: K × M, the reference.
    """
    a, z = np.asarray(points, float), np.asarray(front, float)
    behind = np.maximum(a[None, :, :] - z[:, None, :], 0.0)  # (K, N, M)
    return float(np.sqrt((behind**2).sum(axis=2)).min(axis=1).mean())


def pareto(points: Sequence[Point]) -> list[Point]:
    """The non-dominated of pairs to be minimised, each once, in order of the first coordinate.

    By a sweep: an enumerated space has too many points to compare each with each.
    """
    found: list[Point] = []
    for point in sorted({(float(first), float(second)) for first, second in points}):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found
