"""RTN: round every weight to the nearest level. Needs no calibration; all that embeddings take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.core.unit import SiteFormat
from autocomp.operators.quantize.nearest import Nearest

if TYPE_CHECKING:
    from torch import Tensor


class RoundToNearest(Nearest):
    """Symmetric round-to-nearest; below 8 bits the scale minimises the squared weight error."""

    name = "rtn"
    summary = "Round weights to the nearest of 8, 4, 3 or 2 bits; no calibration."
    paper = ""
    version = 1

    def scales(self, weight: Tensor, format: SiteFormat) -> Tensor:
        """Scales `(rows, groups)` of least squared error for `weight (rows, columns)`."""
        from autocomp.operators.quantize.grid import search_scales

        return search_scales(weight, format)


OPERATOR = RoundToNearest()
