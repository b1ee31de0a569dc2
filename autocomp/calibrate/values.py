"""What a site's input values were: extremes of every column, and a sample of rows. Needs torch.

A Gram matrix says nothing of ranges. Kept beside it, these answer any question about them, also
once columns have been removed or scaled: the extremes exactly, the rest from the sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SAMPLE_ROWS = 512
SAMPLE_VALUES = 1 << 20
"""A sample holds at most this many rows, and at most this many values (4 MB)."""


def sample_rows(columns: int) -> int:
    """Rows kept of an input of `columns` columns."""
    return max(1, min(SAMPLE_ROWS, SAMPLE_VALUES // columns))


class Values:
    """Running extremes of each column, and a sample that does not depend on how rows are batched.

    Every row has a pseudo-random priority that follows from its number; the rows of lowest priority
    are kept.
    """

    def __init__(self, columns: int) -> None:
        self.low = torch.full((columns,), torch.inf)
        self.high = torch.full((columns,), -torch.inf)
        self._size = sample_rows(columns)
        self._rows = torch.empty(0, columns)
        self._priorities = np.empty(0, np.uint64)
        self._seen = 0

    def add(self, rows: Tensor) -> None:
        """`rows (N, columns)`, float32."""
        if not len(rows):
            return
        low, high = torch.aminmax(rows, dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        priorities = _priorities(self._seen, len(rows))
        self._seen += len(rows)
        lowest = np.sort(np.argsort(priorities, kind="stable")[: self._size])
        together = np.concatenate([self._priorities, priorities[lowest]])
        pool = torch.cat([self._rows, rows[torch.from_numpy(lowest)]])
        kept = np.sort(np.argsort(together, kind="stable")[: self._size])
        self._rows, self._priorities = pool[torch.from_numpy(kept)], together[kept]

    @property
    def sample(self) -> Tensor:
        """The rows kept, in the order they came, `(n, columns)`."""
        return self._rows


def _priorities(start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Of the rows numbered `start` and on: splitmix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
