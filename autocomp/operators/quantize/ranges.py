"""The range of static 8-bit activations, from calibration: smallest and largest, percentile, MSE.

Needs torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.calibrate.stats import SiteStats
from autocomp.core.activation_grid import float32
from autocomp.core.errors import InternalError
from autocomp.operators.gram import derived

PERCENTILE = 0.9999
"""Share of the values the upper end of a percentile range lets pass; mirrored at the lower end."""

FRACTIONS = tuple(0.94**step for step in range(72))
"""Fractions of the largest and of the smallest value that an MSE range is tried at, to 1%."""


def static_range(
    stats: SiteStats, method: str, kept: Tensor | None = None, scale: Tensor | None = None
) -> tuple[float, float]:
    """Lower and upper end (float32 values) of the inputs of a site; zero lies between them.

    Args:
        method: `minmax`: the extremes over all tokens. `percentile`: one value in ten thousand is
            clipped at either end. `mse`: least expected squared error, clipping and rounding.
        kept: columns that remain, `None` for all.
        scale: float32 `(columns that remain,)`, what inputs are multiplied by; positive.

    Raises:
        InternalError: if the statistics hold no values.
    """
    key = (
        "range",
        method,
        None if kept is None else kept.numpy().tobytes(),
        None if scale is None else scale.numpy().tobytes(),
    )
    return derived(stats.gram, key, lambda: _range(stats, method, kept, scale))


def _range(
    stats: SiteStats, method: str, kept: Tensor | None, scale: Tensor | None
) -> tuple[float, float]:
    if stats.low is None or stats.high is None or stats.sample is None:
        raise InternalError("these statistics hold no ranges of inputs: calibrate again")
    lows, highs, sample = stats.low, stats.high, stats.sample
    if kept is not None:
        lows, highs, sample = lows[kept], highs[kept], sample[:, kept]
    if scale is not None:
        lows, highs, sample = lows * scale, highs * scale, sample * scale
    low, high = min(float(lows.min()), 0.0), max(float(highs.max()), 0.0)
    if method == "percentile":
        values = sample.flatten().sort().values
        last = len(values) - 1
        low = min(float(values[round((1 - PERCENTILE) * last)]), 0.0)
        high = max(float(values[round(PERCENTILE * last)]), 0.0)
    elif method == "mse":
        weight = max(stats.count, 1) / max(len(sample), 1)
        low, high = _least_error(torch.cat([lows, highs]), sample.flatten(), weight, low, high)
    elif method != "minmax":
        raise InternalError(f"no range method {method!r}")
    return float32(low), float32(high)


def _least_error(
    extremes: Tensor, sample: Tensor, weight: float, low: float, high: float
) -> tuple[float, float]:
    """Ends of least expected squared error among `FRACTIONS` of `low` and of `high`.

    A value outside costs its squared distance to the range; one inside that is rounded to zero its
    square, another a twelfth of a squared step. Sampled values count `weight` times, each column's
    extremes once more, as a sample tends to miss them.
    """
    values = torch.cat([sample, extremes]).double()
    weights = torch.ones_like(values)
    weights[: len(sample)] = weight
    fractions = torch.tensor(FRACTIONS, dtype=torch.float64)
    lows, highs = low * fractions, high * fractions
    below = _beyond(-values, weights, -lows)  # (tried,)
    above = _beyond(values, weights, highs)
    step = (highs.unsqueeze(0) - lows.unsqueeze(1)) / 255.0  # (lows, highs)
    sizes, order = values.abs().sort()
    counts, energy = _sums(weights[order]), _sums(weights[order] * sizes.square())
    small = torch.searchsorted(sizes, step / 2.0)  # so many are rounded to zero
    rounding = energy[small] + (counts[-1] - counts[small]) * step.square() / 12.0
    best = int((below.unsqueeze(1) + above.unsqueeze(0) + rounding).argmin())
    return float(lows[best // len(fractions)]), float(highs[best % len(fractions)])


def _beyond(values: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Σ w (v − end)² over the values above each end."""
    ordered, order = values.sort(descending=True)
    w = weights[order]
    count = torch.searchsorted(-ordered, -ends)  # so many lie above
    sums = [_sums(moment)[count] for moment in (w, w * ordered, w * ordered.square())]
    return (sums[2] - 2 * ends * sums[1] + ends.square() * sums[0]).clamp_min(0.0)


def _sums(values: Tensor) -> Tensor:
    """Of the first 0, 1, 2, … values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
