"""A table that holds the rows of kept tokens alone and is still asked by original ids."""

from __future__ import annotations

import torch
from torch import nn

from autocomp.models.vocabulary import Vocabulary


class PrunedTable(nn.Module):
    """Original ids `(...)` → `(..., width)`; a token that was not kept reads the unknown one's row.

    `table` is a plain or a quantised embedding of the kept rows.
    """

    row_of: torch.Tensor
    kept: torch.Tensor

    def __init__(self, table: nn.Module, row_of: torch.Tensor, kept: torch.Tensor) -> None:
        """`row_of` int64 `(original rows,)`, `kept` int64 `(rows,)`, ascending original ids."""
        super().__init__()
        self.table = table
        self.register_buffer("row_of", row_of)
        self.register_buffer("kept", kept)

    @property
    def padding_idx(self) -> int | None:
        """The original id of the row that is not trained."""
        row = getattr(self.table, "padding_idx", None)
        return None if row is None else int(self.kept[row])

    def vocabulary(self) -> Vocabulary | None:
        """What was kept; `None` if that is everything."""
        dropped = torch.ones(len(self.row_of), dtype=torch.bool)
        dropped[self.kept] = False
        rows = self.row_of[dropped]
        if len(rows) == 0:
            return None
        unknown = int(self.kept[rows[0]])
        return Vocabulary(tuple(self.kept.tolist()), unknown, len(self.row_of))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the kept tokens."""
        output: torch.Tensor = self.table(self.row_of[ids])
        return output


def model_vocabulary(model: nn.Module) -> Vocabulary | None:
    """The pruned vocabulary of a stitched model, if it has one."""
    for module in model.modules():
        if isinstance(module, PrunedTable):
            return module.vocabulary()
    return None
