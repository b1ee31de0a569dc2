"""Dominance among points with mixed senses, exact hypervolume, crowding distance.

A point with a missing (`None`, NaN) or infinite coordinate never ranks: it is on no front,
dominates nothing, and adds no volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sense = Literal["max", "min"]
Points = Sequence[Sequence[float | None]]


def _losses(points: Points, senses: Sequence[Sense]) -> NDArray[np.float64]:
    """`(N, M)` to be minimised, NaN where missing or infinite."""
    for sense in senses:
        if sense not in ("max", "min"):
            raise ValueError(f"a sense is 'max' or 'min', not {sense!r}")
    for point in points:
        if len(point) != len(senses):
            raise ValueError(f"point {point!r} has {len(point)} values for {len(senses)} senses")
    if not points:
        return np.empty((0, len(senses)))
    rows = [[np.nan if value is None else float(value) for value in point] for point in points]
    losses = np.array(rows, dtype=np.float64)
    losses[~np.isfinite(losses)] = np.nan
    losses *= np.array([-1.0 if sense == "max" else 1.0 for sense in senses])
    return losses


def non_dominated(points: Points, senses: Sequence[Sense]) -> list[bool]:
    """Whether each point is dominated by none.

    A point dominates another if it is no worse anywhere and better somewhere; equal points
    therefore stay together.

    Args:
        points: N points of M values.
        senses: M times `max` or `min`.
    """
    losses = _losses(points, senses)
    ranks: NDArray[np.bool_] = np.asarray(np.isfinite(losses).all(axis=1))
    flags: list[bool] = []
    for index, loss in enumerate(losses):
        if not ranks[index]:
            flags.append(False)
            continue
        with np.errstate(invalid="ignore"):
            beaten = (losses <= loss).all(axis=1) & (losses < loss).any(axis=1)
        flags.append(not bool((beaten & ranks).any()))
    return flags


def hypervolume(
    points: Points, reference: Sequence[float], senses: Sequence[Sense] | None = None
) -> float:
    """Volume between `reference` and the points that beat it in every objective. Exact.

    Slices along the last objective and recurses (While et al., 2006); meant for up to four
    objectives and some hundred points.

    Args:
        points: N points of M values.
        reference: the corner, M finite values.
        senses: M times `max` or `min`; all `min` by default.
    """
    senses = senses or ["min"] * len(reference)
    corner = _losses([reference], senses)[0]
    if not np.isfinite(corner).all():
        raise ValueError(f"the reference must be finite, not {tuple(reference)!r}")
    losses = _losses(points, senses)
    losses = losses[np.isfinite(losses).all(axis=1)]
    return _volume(losses[(losses < corner).all(axis=1)], corner)


def _volume(losses: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    if len(losses) == 0:
        return 0.0
    if losses.shape[1] == 1:
        return float(corner[0] - losses[:, 0].min())
    order = np.argsort(losses[:, -1], kind="stable")
    losses = losses[order]
    if losses.shape[1] == 2:
        best = np.minimum.accumulate(losses[:, 0])
        tops = np.append(losses[1:, 1], corner[1])
        return float(((corner[0] - best) * (tops - losses[:, 1])).sum())
    volume = 0.0
    tops = np.append(losses[1:, -1], corner[-1])
    for index, top in enumerate(tops):
        thickness = top - losses[index, -1]
        if thickness > 0:
            slab = losses[: index + 1, :-1]
            keep = non_dominated(slab.tolist(), ["min"] * slab.shape[1])
            volume += float(thickness) * _volume(slab[keep], corner[:-1])
    return volume


def crowding(points: Points) -> list[float]:
    """Crowding distance of each point among the others (Deb et al., 2002).

    Infinite at the ends of every objective in which points differ; 0 for one that does not rank.
    """
    if not points:
        return []
    losses = _losses(points, ["min"] * len(points[0]))
    ranks = np.flatnonzero(np.isfinite(losses).all(axis=1))
    distance = np.zeros(len(points))
    for column in range(losses.shape[1]):
        order = ranks[np.argsort(losses[ranks, column], kind="stable")]
        if len(order) == 0:
            continue
        values = losses[order, column]
        span = values[-1] - values[0]
        if span > 0:
            distance[order[0]] = distance[order[-1]] = np.inf
            distance[order[1:-1]] += (values[2:] - values[:-2]) / span
    return [float(value) for value in distance]
