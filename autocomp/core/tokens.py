"""How a step shortens the sequence that later units see. No torch.

Token reduction changes no weight. A step that stands for it removes a fixed number of patch tokens
after its unit, so the sequence length at every unit follows from a candidate alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Method = Literal["tome", "token_prune", "token_fuse"]


@dataclass(frozen=True)
class TokenReduction:
    """Patch tokens that are merged or dropped behind an attention sublayer.

    Attributes:
        method: `tome` merges pairs of similar tokens, `token_prune` drops tokens, `token_fuse`
            puts one in the place of those it drops.
        ratio: share of the patch tokens present that goes, in [0, 1).
        protected: leading tokens that always stay: class, distillation and register tokens.
    """

    method: Method
    ratio: float
    protected: int = 1

    def chosen(self, tokens: int) -> int:
        """How many of `tokens` are merged or dropped: floor(ratio · patches); at most half merge.

        Never all patches are dropped.
        """
        patches = max(0, tokens - self.protected)
        wanted = math.floor(self.ratio * patches + 1e-9)
        return min(wanted, patches // 2) if self.method == "tome" else min(wanted, patches - 1)

    def removed(self, tokens: int) -> int:
        """How many fewer than `tokens` there are afterwards."""
        if self.method == "token_fuse":
            return max(self.chosen(tokens) - 1, 0)
        return self.chosen(tokens)

    def kept(self, tokens: int) -> int:
        """How many of `tokens` tokens are left."""
        return tokens - self.removed(tokens)
