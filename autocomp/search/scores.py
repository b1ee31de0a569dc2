"""Replace-one scores: how far the whole model's output moves when one unit changes alone.

The score of an option is the mean KL(teacher ‖ model) in nats on calibration tokens with that
option at one unit and everything else dense; for an additive estimate they are summed over units.
Ranks candidates far better than local error (Spearman 0.98 against 0.84 on an enumerated space);
it degrades where everything is compressed hard, which is why screening follows.

Where options are many, the ends of each *family* are scored. Its options differ in how coarsely
they keep weights alone; between the one of the least and the one of the largest local error, scores
are interpolated, linearly in that error: to second order the divergence of a rounded layer is
proportional to its squared error, and whatever else the options have in common comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocomp.core.candidate import Candidate, Option
from autocomp.core.errors import InternalError
from autocomp.search.space import Space

EACH = 500
"""Up to so many options, each is scored."""

Table = Mapping[str, Mapping[str, float | None]]
"""Unit → option key → KL in nats."""


@dataclass(frozen=True)
class LocalError:
    """What an option does to the outputs of its unit.

    Attributes:
        family: the same for options that differ in how coarsely they keep weights alone.
        error: relative and squared, ‖Wx − Ŵx‖² / ‖Wx‖², summed over the layers of the unit.
    """

    family: str
    error: float


LocalErrors = Mapping[str, Mapping[str, LocalError]]
"""Unit → option key → local error."""


class Scores:
    """The table unit → option key → KL in nats. Dense scores 0 and need not be in the table.

    An option whose score is not finite broke the model: it gets `inf` and is never proposed.
    A negative score (noise) counts as 0.
    """

    def __init__(self, table: Table) -> None:
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


def to_score(
    space: Space, known: Table, local: LocalErrors | None = None
) -> list[tuple[str, Option, Candidate]]:
    """What of `replace_one` still has to be scored.

    Args:
        space: the space.
        known: scores so far.
        local: local errors of all options; `None` to have every option scored. Otherwise the ends
            of a family are enough. If the one of the largest error breaks the model, it is the next
            one's turn: call again once the scores are known.
    """
    wanted = replace_one(space)
    if local is None:
        return [entry for entry in wanted if entry[1].key not in known.get(entry[0], {})]
    asked: set[tuple[str, str]] = set()
    for unit, members in _families(space, local):
        row = _row(known, unit)
        broken = [key for key in members if key in row and not _works(row[key])]
        left = [key for key in members if key not in broken]
        asked |= {(unit, key) for key in (members[0], *left[-1:]) if key not in row}
    return [entry for entry in wanted if (entry[0], entry[1].key) in asked]


def interpolated(space: Space, known: Table, local: LocalErrors) -> Scores:
    """Every option's score: known, or on the line through those of its family's ends.

    Args:
        space: the space.
        known: scores; nothing is left `to_score`.
        local: local errors of all options.
    """
    table = {unit: _row(known, unit) for unit in space.names}
    for unit, members in _families(space, local):
        row = table[unit]
        works = {key: max(0.0, row[key] or 0.0) for key in members if _works(row.get(key))}
        if not works:
            continue  # each was scored, and broke the model
        errors, scores = [local[unit][key].error for key in works], list(works.values())
        for key in members:
            if key not in row:
                row[key] = float(np.interp(local[unit][key].error, errors, scores))
    return Scores(table)


def _families(space: Space, local: LocalErrors) -> list[tuple[str, list[str]]]:
    """Unit and options of each family, those of larger errors last, dense first of all."""
    found: dict[tuple[str, str], list[str]] = {}
    for unit, options in space.options.items():
        ranked = [(not option.dense, local[unit][option.key].error, option) for option in options]
        for _, _, option in sorted(ranked):
            found.setdefault((unit, local[unit][option.key].family), []).append(option.key)
    return [(unit, keys) for (unit, _), keys in found.items()]


def _row(known: Table, unit: str) -> dict[str, float | None]:
    return {Option().key: 0.0, **known.get(unit, {})}


def _works(score: float | None) -> bool:
    return score is not None and math.isfinite(score)
