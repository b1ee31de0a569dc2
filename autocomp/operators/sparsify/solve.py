"""The SparseGPT recursion: choose and drop weights column by column, in blocks. Needs torch.

Frantar & Alistarh, 2023, arXiv:2301.00774, algorithm 1, written left-looking as
`quantize.solve`: a column's corrections are gathered when its turn comes, those of a whole block
reach the rest in one matrix product. Columns are taken as they stand: blocks of alike importance,
and the groups of an N:M pattern, lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocomp.operators.gram import Factor
from autocomp.operators.sparsify.choices import Level, kept_per_row, pattern
from autocomp.operators.sparsify.masks import lowest_mask, pattern_mask

BLOCK = 128


def solve_sparse(
    weight: Tensor, factor: Factor, level: Level, heights: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Weights and mask, `(rows, columns)` both, for `weight (rows, columns)`.

    `factor` is of columns in their own order; those without input go first. `heights` are the row
    counts of the layers stacked in `weight`: every one of them keeps exactly its rows ×
    `kept_per_row`. A fraction's zeros are shared out evenly over the blocks of columns; within a
    block they fall where w² / U[i, i]² is lowest. Under N:M they fall so within every group of a
    row, looked at when its first column comes.
    """
    rows, columns = weight.shape
    group = pattern(level)
    pending = weight.t().contiguous()  # (columns, rows), corrected as we go
    pending[factor.dead] = 0.0
    result = torch.empty_like(pending)
    keep = torch.empty(columns, rows, dtype=torch.bool)
    zeros = columns - kept_per_row(level, columns)
    for start in range(0, columns, _width(group)):
        stop = min(start + _width(group), columns)
        square = factor.upper[start:stop, start:stop]
        mixing = square.t().contiguous()  # row i: U[:i, i]
        pivots = mixing.diagonal()
        if group is None:
            scores = (pending[start:stop] / pivots[:, None]).square_()
            first = 0
            for height in heights:
                part = slice(first, first + height)
                # Of `zeros` a row, those up to this block less those up to the last.
                count = height * zeros * stop // columns - height * zeros * start // columns
                keep[start:stop, part] = ~lowest_mask(scores[:, part].contiguous(), count)
                first = part.stop
        errors = pending.new_empty(stop - start, rows)
        divisors = pivots.tolist()
        for i in range(stop - start):
            column = pending[start + i]
            if group is not None and i % group[1] == 0:
                end = min(i + group[1], stop - start)
                keep[start + i : start + end] = _group_mask(
                    pending[start + i : start + end],
                    errors[:i],
                    mixing[i:end],
                    pivots[i:end],
                    group,
                )
            if i:
                column = torch.addmv(column, errors[:i].t(), mixing[i, :i], alpha=-1)
            kept = keep[start + i]
            result[start + i] = torch.where(kept, column, 0.0)
            torch.sub(column, result[start + i], out=errors[i]).div_(divisors[i])
        if stop < columns:
            pending[stop:].addmm_(factor.upper[start:stop, stop:].t(), errors, alpha=-1)
    return result.t().contiguous(), keep.t().contiguous()


def _width(group: tuple[int, int] | None) -> int:
    """Columns swept at a time: whole groups."""
    return BLOCK if group is None else max(BLOCK // group[1], 1) * group[1]


def _group_mask(
    columns: Tensor, errors: Tensor, mixing: Tensor, pivots: Tensor, group: tuple[int, int]
) -> Tensor:
    """Kept weights `(m, rows)` of the next `columns (m, rows)`, corrected by `errors (i, rows)`."""
    done = len(errors)
    current = torch.addmm(columns, mixing[:, :done], errors, alpha=-1) if done else columns
    scores = (current / pivots[:, None]).square_()
    return pattern_mask(scores.t(), *group).t()
