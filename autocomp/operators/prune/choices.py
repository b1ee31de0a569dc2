"""Reading the structural choices of a rule: fractions of a count, in whole steps. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocomp.core.errors import UserError


def kept_counts(
    choices: Any, total: int, *, step: int, operator: str, unit: str
) -> list[int | None]:
    """Fractions kept → counts, multiples of `step`, at least one step; `None` for all of `total`.

    Raises:
        UserError: for anything but a list of fractions in (0, 1].
    """
    counts: dict[int | None, None] = {}
    for fraction in read_fractions(choices, operator=operator, unit=unit):
        count = max(step, int(fraction * total / step + 0.5) * step)
        counts[None if count >= total else count] = None
    return list(counts)


def read_fractions(choices: Any, *, operator: str, unit: str) -> list[float]:
    """The fractions a rule lists.

    Raises:
        UserError: for anything but a list of fractions in (0, 1].
    """
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise UserError(
            f"{operator} at {unit}: {choices!r} is no list of fractions like [1.0, 0.5]"
        )
    for fraction in choices:
        if isinstance(fraction, bool) or not isinstance(fraction, int | float):
            raise UserError(f"{operator} at {unit}: {fraction!r} is no fraction in (0, 1]")
        if not 0 < fraction <= 1:
            raise UserError(
                f"{operator} at {unit}: the fraction kept must be in (0, 1], not {fraction}. "
                f"To drop the whole sublayer, write skip: true"
            )
    return [float(fraction) for fraction in choices]
