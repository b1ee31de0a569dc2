"""The GPTQ recursion: quantise columns one by one, in blocks. Needs torch.

Frantar et al., 2022, arXiv:2210.17323, algorithm 1, written left-looking: a column's corrections
are gathered when its turn comes (one matrix-vector product) instead of being scattered after every
column, and those of a whole block reach the rest in one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocomp.core.unit import SiteFormat
from autocomp.models.codes import CODE_RANGE, group_size
from autocomp.operators.gram import Factor

BLOCK = 128


def solve_columns(
    weight: Tensor,
    scales: Tensor,
    factor: Factor,
    format: SiteFormat,
    mask: Tensor | None = None,
) -> Tensor:
    """Codes, int8 `(rows, columns)`, for `weight (rows, columns)` on fixed `scales (rows, groups)`.

    Columns are taken in `factor.order`; those without input (`factor.dead`) become zero. So do
    weights where the bool `mask (rows, columns)` is false: the columns still to come make up for
    them as they do for rounding.
    """
    low, high = CODE_RANGE[format.weight_bits]
    rows, columns = weight.shape
    group = torch.div(factor.order, group_size(format), rounding_mode="floor")
    pending = weight.t()[factor.order].contiguous()  # (columns, rows), corrected as we go
    pending[factor.dead[factor.order]] = 0.0
    keep = None if mask is None else mask.t()[factor.order].to(weight.dtype)
    step = scales.t().contiguous()  # (groups, rows)
    inverse = step.reciprocal()
    groups = group.tolist()
    codes = torch.empty_like(pending)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        mixing = factor.upper[start:stop, start:stop].t().contiguous()  # row i: U[:i, i]
        pivots = mixing.diagonal().tolist()
        errors = pending.new_empty(stop - start, rows)
        for i in range(stop - start):
            column = pending[start + i]
            if i:
                column = torch.addmv(column, errors[:i].t(), mixing[i, :i], alpha=-1)
            which = groups[start + i]
            code = codes[start + i]
            torch.mul(column, inverse[which], out=code).round_().clamp_(low, high)
            if keep is not None:
                code.mul_(keep[start + i])
            torch.addcmul(column, code, step[which], value=-1, out=errors[i]).div_(pivots[i])
        if stop < columns:
            pending[stop:].addmm_(factor.upper[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty(rows, columns, dtype=torch.int8)
    result[:, factor.order] = codes.t().to(torch.int8)
    return result
