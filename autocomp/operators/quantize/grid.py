"""The quantisation grid: symmetric integer codes times a scale per row or per group of columns.

8-bit codes run −127…127, 4-bit codes −8…7, 3-bit codes −4…3, 2-bit codes −2…1. Needs torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.core.unit import SiteFormat
from autocomp.models.codes import CODE_RANGE, group_size, quantise

SHRINK: dict[int, tuple[float, ...]] = {
    bits: tuple(1.0 - 0.025 * step for step in range(tried))
    for bits, tried in ((4, 20), (3, 28), (2, 34))
}
"""Weight bits → fractions of the largest weight a scale is tried at; fewer bits clip more."""

_TINY = 1e-30
_PIECE = 1 << 16


def search_scales(weight: Tensor, format: SiteFormat) -> Tensor:
    """Scales `(rows, groups)` for `weight (rows, columns)`.

    8 bits: the largest weight over 127. Fewer: the fraction of the largest weight that minimises
    the squared rounding error of the group. A group of zeros gets scale 1.
    """
    return torch.cat([_search(weight[rows], format) for rows in row_slices(weight)])


def row_slices(weight: Tensor) -> list[slice]:
    """Rows in pieces that stay in the processor's cache: a table is far larger."""
    rows, step = weight.shape[0], max(1, _PIECE // weight.shape[1])
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _search(weight: Tensor, format: SiteFormat) -> Tensor:
    low, high = CODE_RANGE[format.weight_bits]
    values = grouped(weight, group_size(format))  # (rows, groups, group)
    largest = values.abs().amax(dim=2)
    full = largest / high
    live = ~(full <= _TINY)  # NaN is no group of zeros
    full = torch.where(live, full, torch.ones_like(full))
    if format.weight_bits == 8:
        return full
    best = full
    best_error = torch.full_like(full, float("inf"))
    for shrink in SHRINK[format.weight_bits]:
        scales = full * shrink
        inverse = scales.reciprocal().unsqueeze(2)
        rounded = (values * inverse).round_().clamp_(low, high)
        error = rounded.mul_(scales.unsqueeze(2)).sub_(values).square_().sum(dim=2)
        better = error < best_error
        best = torch.where(better, scales, best)
        best_error = torch.where(better, error, best_error)
    return torch.where(live, best, torch.ones_like(best))


def round_to_grid(weight: Tensor, scales: Tensor, format: SiteFormat) -> Tensor:
    """Nearest codes, int8 `(rows, columns)`."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows in row_slices(weight):
        codes[rows] = quantise(weight[rows], scales[rows], format).to(torch.int8)
    return codes


def grouped(weight: Tensor, size: int) -> Tensor:
    """`(rows, columns)` → `(rows, groups, size)`, the last group padded with zeros."""
    rows, columns = weight.shape
    missing = -columns % size
    if missing:
        weight = torch.nn.functional.pad(weight, (0, missing))
    return weight.reshape(rows, -1, size)
