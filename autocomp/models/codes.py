"""Integer codes of weights: their range, the groups that share a scale, rounding and back.

Codes are symmetric: −127…127 at 8 bits, −8…7 at 4, −4…3 at 3 and −2…1 at 2; one scale per row, or
per `group` consecutive columns of a row (the last group may be shorter).
"""

from __future__ import annotations

import torch

from autocomp.core.unit import SiteFormat
from autocomp.models.rounding import straight_through

CODE_RANGE: dict[int, tuple[int, int]] = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}
"""Weight bits → smallest and largest code."""


def group_size(format: SiteFormat) -> int:
    """Columns that share a scale: the whole row when `format.group` is `None`."""
    return format.group or format.columns


def group_count(format: SiteFormat) -> int:
    """Scales per row."""
    return -(-format.columns // group_size(format))


def expand_scales(scales: torch.Tensor, columns: int, group: int) -> torch.Tensor:
    """Scales `(rows, groups)` so that they broadcast against `(rows, columns)`."""
    if scales.shape[-1] == 1:
        return scales
    return scales.repeat_interleave(group, dim=-1)[..., :columns]


def quantise(weight: torch.Tensor, scales: torch.Tensor, format: SiteFormat) -> torch.Tensor:
    """Codes of `weight`, as float, in the shape of `weight` `(..., columns)`; round half to even.

    `scales` is `(..., groups)`. A group whose scale is zero gets code zero.
    """
    low, high = CODE_RANGE[format.weight_bits]
    steps = expand_scales(scales, weight.shape[-1], group_size(format))
    divisor = torch.where(steps > 0, steps, torch.inf)
    return (weight / divisor).round_().clamp_(low, high)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, format: SiteFormat) -> torch.Tensor:
    """`codes * scale`, float32, in the shape of `codes` `(..., columns)`; `scales` `(..., groups)`.

    Scales are not expanded: stitching spends its time here.
    """
    weight = codes.to(torch.float32, copy=True)
    columns = weight.shape[-1]
    size = group_size(format)
    whole = columns // size * size
    if whole:
        grouped = torch.unflatten(weight[..., :whole], -1, (-1, size))
        grouped.mul_(scales[..., : whole // size].unsqueeze(-1))
    if whole < columns:
        weight[..., whole:].mul_(scales[..., -1:])
    return weight


def fake_quantise_weight(
    weight: torch.Tensor,
    scales: torch.Tensor,
    format: SiteFormat,
    held: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight` `(..., columns)` rounded to its codes and back; gradient clipped to the range.

    Where the mask `held` is false there is no gradient: a weight that is zero there stays zero.
    """
    with torch.no_grad():
        rounded = dequantise(quantise(weight, scales, format), scales, format)
        mask = None
        if weight.requires_grad:
            low, high = CODE_RANGE[format.weight_bits]
            steps = expand_scales(scales, weight.shape[-1], group_size(format))
            mask = (weight >= (low - 0.5) * steps) & (weight <= (high + 0.5) * steps)
            if held is not None:
                mask &= held
    return straight_through(weight, rounded, mask)
