"""Values on the command line: durations, quantities."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
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


class Written(click.ParamType):  # type: ignore[type-arg]
    """What `parse` can read; checked here, passed on as written."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if it parses."""
        try:
            self._parse(str(value))
        except UserError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def quantity(dimension: Dimension) -> Written:
    """A limit of a budget."""
    return Written(dimension, partial(parse_limit, dimension=dimension))


QUALITY = Written("quality", parse_floor)
"""A floor on quality."""
