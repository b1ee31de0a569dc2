"""HQQ: round to the scales of least l_p error, p < 1. No calibration; embeddings take it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.core.unit import SiteFormat
from autocomp.operators.quantize.nearest import Nearest

if TYPE_CHECKING:
    from torch import Tensor


class HalfQuadratic(Nearest):
    """Symmetric half-quadratic quantisation: the scale is optimised, weights are rounded to it."""

    name = "hqq"
    summary = "Round weights to 8, 4, 3 or 2 bits, forgiving outliers; no calibration."
    paper = "Badri & Shaji, 2023, Half-Quadratic Quantization of Large Machine Learning Models"
    version = 1

    def scales(self, weight: Tensor, format: SiteFormat) -> Tensor:
        """Scales `(rows, groups)` of least l_p error for `weight (rows, columns)`."""
        from autocomp.operators.quantize.half_quadratic import half_quadratic_scales

        return half_quadratic_scales(weight, format)


OPERATOR = HalfQuadratic()
