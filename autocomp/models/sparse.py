"""Sparse layers of float weights: what is zero stays zero in training."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from autocomp.core.unit import SiteFormat
from autocomp.models.rounding import straight_through


def check_mask(weight: torch.Tensor, mask: torch.Tensor | None, format: SiteFormat) -> None:
    """Raise ValueError unless a sparse `format`, and no other, has a mask of `weight`'s shape."""
    if (mask is None) != (format.nonzeros is None):
        raise ValueError(f"a sparse format needs a mask, a dense one has none: {format}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        raise ValueError(
            f"mask {mask.dtype} {tuple(mask.shape)} must be bool {tuple(weight.shape)}"
        )


class SparseLinear(nn.Module):
    """A linear layer `(..., columns) → (..., rows)` of float weights, zero where `mask` is false.

    There they have no gradient, so that they stay zero in training (without weight decay).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor,
        format: SiteFormat,
    ) -> None:
        """`weight` and bool `mask` `(rows, columns)`, `bias` `(rows,)`; used as they are.

        Raises:
            ValueError: if `mask` does not fit.
        """
        super().__init__()
        check_mask(weight, mask, format)
        self.format = format
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.register_buffer("mask", mask)
        self.in_features, self.out_features = format.columns, format.rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., columns)` → `(..., rows)`."""
        return F.linear(x, straight_through(self.weight, self.weight, self.mask), self.bias)

    def extra_repr(self) -> str:
        """Shape and weights kept."""
        kind = self.format
        return f"rows={kind.rows}, columns={kind.columns}, nonzeros={kind.nonzeros}"
