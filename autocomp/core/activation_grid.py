"""The uint8 grid of activations whose range was fixed at calibration. No torch.

Training, export and the runtimes must agree on it bit for bit, so it is computed in one place.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

from autocomp.core.errors import InternalError


@lru_cache(maxsize=4096)
def static_grid(low: float, high: float) -> tuple[float, int]:
    """Scale (representable in float32) and zero point (0…255) of `low … high` on 0…255.

    The range is widened to hold zero, which is then exact; an empty range has scale 1.

    Raises:
        InternalError: for a range that is not finite, or whose ends are swapped.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InternalError(f"{low} … {high} is no range of activations: calibrate again")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float32((high - low) / 255.0)
    if scale < 1e-30:
        return 1.0, 0
    return scale, min(max(round(-low / scale), 0), 255)


def float32(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
