"""Scales that make the rounding error sparse: half-quadratic splitting. Needs torch.

Badri & Shaji, 2023, Half-Quadratic Quantization: minimise Σ |W − s Q|^p, p < 1, which forgives few
large errors for many small ones. With an auxiliary error E the problem splits in two that have
closed forms: E is the proximal step of |·|^p on the present error, and the scale is least squares
on W − E. There the zero point was fitted and the scale fixed; the grid here is symmetric, so the
scale is fitted. Errors are taken in steps of the grid, so that the size of weights does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.core.unit import SiteFormat
from autocomp.models.codes import CODE_RANGE, group_size
from autocomp.operators.quantize.grid import grouped, row_slices, search_scales

NORM = 0.7
"""p of the norm."""

START, GROWTH, ITERATIONS = 10.0, 1.01, 20
"""Weight of the coupling of E to the error: at first, and its growth per iteration."""

_TINY = 1e-30


def half_quadratic_scales(weight: Tensor, format: SiteFormat) -> Tensor:
    """Scales `(rows, groups)`; of each group the one of least l_p error that was passed.

    Starts from the scale of least squared error, so it is never worse than that in l_p.
    """
    return torch.cat([_solve(weight[rows], format) for rows in row_slices(weight)])


def _solve(weight: Tensor, format: SiteFormat) -> Tensor:
    low, high = CODE_RANGE[format.weight_bits]
    values = grouped(weight, group_size(format))  # (rows, groups, group)
    scale = search_scales(weight, format)
    best, best_error = scale, torch.full_like(scale, torch.inf)
    coupling = START
    for _ in range(ITERATIONS + 1):
        inverse = scale.reciprocal().unsqueeze(2)
        steps = values * inverse
        codes = steps.round().clamp_(low, high)
        error = steps - codes  # in steps
        size = error.abs()
        total = size.pow(NORM).sum(dim=2) * scale.pow(NORM)
        better = total < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, total, best_error)
        # Proximal step of |·|^p as the paper has it; zero errors stay zero.
        shrunk = (size - size.pow(NORM - 1.0) / coupling).clamp_min_(0.0)
        target = steps - error.sign() * shrunk
        energy = codes.square().sum(dim=2)
        ratio = (codes * target).sum(dim=2) / energy.clamp_min(1.0)
        usable = (energy > 0) & (ratio * scale > _TINY)
        scale = torch.where(usable, ratio * scale, scale)
        coupling *= GROWTH
    return best
