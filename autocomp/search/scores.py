"""Replace-one scores: how far the whole model's output moves when one unit changes alone.

The score of an option is the mean KL(teacher ‖ model) in nats on calibration tokens with that
option at one unit and everything else dense; for an additive estimate they are summed over units.
Ranks candidates far better than local error (Spearman 0.98 against 0.84 on an enumerated space);
it degrades where everything is compressed hard, which is why screening follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autocomp.core.candidate import Candidate, Option
from autocomp.core.errors import InternalError
from autocomp.search.space import Space


class Scores:
    """The table unit → option key → KL in nats. Dense scores 0 and need not be in the table.

    An option whose score is not finite broke the model: it gets `inf` and is never proposed.
    A negative score (noise) counts as 0.
    """

    def __init__(self, table: Mapping[str, Mapping[str, float | None]]) -> None:
        self.table = {unit: dict(row) for unit, row in table.items()}

    def of(self, unit: str, option: Option) -> float:
        """The score of one option.

        Raises:
            InternalError: if it was never scored.
        """
        if option.dense:
            return 0.0
        row = self.table.get(unit, {})
        if option.key not in row:
            raise InternalError(f"{unit}: {option.label()} has no replace-one score")
        value = row[option.key]
        return math.inf if value is None or not math.isfinite(value) else max(0.0, value)

    def arrays(self, space: Space) -> list[NDArray[np.float64]]:
        """`arrays[unit index][option index]`.

        Raises:
            InternalError: if an option was never scored, or no option of a unit works.
        """
        arrays = []
        for name in space.names:
            row = np.array([self.of(name, option) for option in space.options[name]])
            if not np.isfinite(row).any():
                raise InternalError(f"{name}: every option breaks the model (no finite score)")
            arrays.append(row)
        return arrays

    def estimate(self, space: Space, vector: Sequence[int]) -> float:
        """Additive estimate of a candidate's KL."""
        pairs = zip(space.names, vector, strict=True)
        return sum(self.of(name, space.options[name][index]) for name, index in pairs)

    def to_json(self) -> dict[str, dict[str, float | None]]:
        """Plain mapping; a score that is not finite becomes null."""
        return {
            unit: {
                key: value if value is not None and math.isfinite(value) else None
                for key, value in row.items()
            }
            for unit, row in self.table.items()
        }


def replace_one(space: Space) -> list[tuple[str, Option, Candidate]]:
    """What has to be scored: every option but dense, alone in an otherwise dense model."""
    dense = {name: Option() for name in space.names}
    return [
        (name, option, Candidate.of({**dense, name: option}))
        for name, option in space
        if not option.dense
    ]
