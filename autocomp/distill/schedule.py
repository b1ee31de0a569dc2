"""The learning rate over a training, as a share of its peak."""

from __future__ import annotations

import math

WARM_UP = 0.1


def rate(schedule: str, done: float) -> float:
    """Share of the peak rate when a share `done` of the tokens was seen.

    Linear warm-up over the first tenth. `cosine` and `linear` fall to zero from the start on,
    `constant` does not fall.
    """
    falls = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1.0 - done,
        "constant": 1.0,
    }
    return min(1.0, (done + 1e-3) / WARM_UP) * falls[schedule]
