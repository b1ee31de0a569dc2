"""The module at a site of low rank: two layers in a row."""

from __future__ import annotations

import torch
from torch import nn


class LowRank(nn.Module):
    """`second(first(x))`: a linear layer `(..., columns) → (..., rows)`, or a table and a layer."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    @property
    def padding_idx(self) -> int | None:
        """Of a table, the row that is not trained."""
        return getattr(self.first, "padding_idx", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs, or integer ids of a table, through both."""
        output: torch.Tensor = self.second(self.first(x))
        return output
