"""Values on the command line: durations, quantities."""

from __future__ import annotations

import re
from typing import Any

import click

from autocomp.core.errors import UserError
from autocomp.core.metric import parse_floor
from autocomp.core.quantities import Dimension, parse_limit

_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?|{_NUMBER}")


class Duration(click.ParamType):  # type: ignore[type-arg]
    """`20m`, `1h30m`, `90s`, `90` (seconds) → seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds, above zero."""
        if isinstance(value, int | float):
            return float(value)
        match = _DURATION.fullmatch(value.strip().lower().replace(" ", ""))
        parts = [float(part or 0) for part in match.groups()] if match else [0.0]
        seconds = sum(part * scale for part, scale in zip(parts, (3600, 60, 1, 1), strict=False))
        if seconds <= 0:
            self.fail(f"{value!r} is no duration: write 90s, 20m or 1h30m", param, ctx)
        return seconds


class Quantity(click.ParamType):  # type: ignore[type-arg]
    """A budget entry; checked here, passed on as written."""

    def __init__(self, dimension: Dimension) -> None:
        self.dimension = dimension
        self.name = dimension

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if it parses."""
        try:
            parse_limit(value, self.dimension)
        except UserError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Quality(click.ParamType):  # type: ignore[type-arg]
    """A floor on quality; checked here, passed on as written."""

    name = "quality"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if it parses."""
        try:
            parse_floor(str(value))
        except UserError as error:
            self.fail(str(error), param, ctx)
        return str(value)
