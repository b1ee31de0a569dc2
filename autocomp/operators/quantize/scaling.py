"""Scales of input channels that move difficulty between weights and activations. Needs torch.

Inputs are divided by `s (columns,)` and the weight's columns multiplied by it, which changes
nothing before rounding. Sites that read one tensor share `s`, so that it is applied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocomp.core.errors import InternalError
from autocomp.core.unit import SiteFormat
from autocomp.models.codes import dequantise
from autocomp.operators.gram import output_error, refuse_not_finite
from autocomp.operators.protocol import SiteStats
from autocomp.operators.quantize.grid import round_to_grid, search_scales

ALPHAS = tuple(step / 20 for step in range(20))
"""Exponents tried by AWQ, as in the paper's code; 0 is plain rounding."""

JUDGED_ROWS = 512
"""Rows of the sites, evenly spread, that exponents are judged on: rows are independent."""

_LEAST = 1e-4
"""Of the largest channel: smaller ones count as this."""


@dataclass(frozen=True)
class ScaledSites:
    """Weights `(rows, columns)` of sites that read one tensor, and the formats they shall have."""

    weights: Sequence[Tensor]
    formats: Sequence[SiteFormat]


def awq_scale(sites: ScaledSites, gram: Tensor, count: int) -> Tensor:
    """s = (root mean square of the channel)^α, α by the least tr(D G Dᵀ) over all sites.

    D is the difference between a weight and what rounding leaves of it, on the original inputs.
    `gram (columns, columns)` is over `count` tokens. Channels without input count as the weakest.
    """
    energy = channel_energy(gram, count)
    judged: dict[tuple[int, int | None], tuple[SiteFormat, list[Tensor]]] = {}
    for weight, form in zip(sites.weights, sites.formats, strict=True):
        _, parts = judged.setdefault((form.weight_bits, form.group), (form, []))
        parts.append(weight[_spread(len(weight))])
    alike = [(form, torch.cat(parts)) for form, parts in judged.values()]
    best, least = torch.ones_like(energy), float("inf")
    for alpha in ALPHAS:
        scale = power_scale(energy, alpha)
        error = 0.0
        for form, weight in alike:
            error += output_error(weight - rounded(weight * scale, form) / scale, gram)
        if error < least:
            best, least = scale, error
    return best


def channel_energy(gram: Tensor, count: int) -> Tensor:
    """Root mean square of each input, `(columns,)`, floored at 10⁻⁴ of the largest; 1 when dead.

    Raises:
        InternalError: if the Gram matrix is not finite.
    """
    refuse_not_finite(gram.diagonal())
    energy = (gram.diagonal() / max(count, 1)).clamp_min(0.0).sqrt()
    largest = energy.max()
    if not bool(largest > 0):
        return torch.ones_like(energy)
    return (energy / largest).clamp_min(_LEAST)


def power_scale(energy: Tensor, alpha: float) -> Tensor:
    """energy^α, its largest and smallest entry reciprocal to each other."""
    scale = energy.pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def smooth_scale(weights: Sequence[Tensor], reach: Tensor, migration: float) -> Tensor:
    """s = max|x|^m / max|w|^(1−m) per channel (SmoothQuant, equation 4), m the `migration`.

    `reach (columns,)` is max|x|. Channels that never saw input, or have no weight, keep theirs.
    """
    weight = torch.stack([w.abs().amax(dim=0) for w in weights]).amax(dim=0)
    live = (reach > 0) & (weight > 0)
    if not bool(live.any()):
        return torch.ones_like(reach)
    x = (reach / reach.max()).clamp_min(_LEAST)
    w = (weight / weight.max()).clamp_min(_LEAST)
    scale = x.pow(migration) / w.pow(1.0 - migration)
    return torch.where(live, scale / scale[live].log().mean().exp(), torch.ones_like(scale))


def reach_of(stats: SiteStats, kept: Tensor | None) -> Tensor:
    """max|x| of each remaining column.

    Raises:
        InternalError: if the statistics hold no ranges, or some that are not finite.
    """
    if stats.low is None or stats.high is None:
        raise InternalError("these statistics hold no ranges of inputs: calibrate again")
    reach = torch.maximum(stats.low.abs(), stats.high.abs())
    refuse_not_finite(reach)
    return reach if kept is None else reach[kept]


def rounded(weight: Tensor, format: SiteFormat) -> Tensor:
    """`weight` rounded to nearest and back."""
    scales = search_scales(weight, format)
    return dequantise(round_to_grid(weight, scales, format), scales, format)


def _spread(rows: int) -> Tensor:
    """At most `JUDGED_ROWS` row numbers, evenly spread."""
    if rows <= JUDGED_ROWS:
        return torch.arange(rows)
    return torch.arange(JUDGED_ROWS) * rows // JUDGED_ROWS
