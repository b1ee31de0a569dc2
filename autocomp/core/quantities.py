"""Quantities a user writes: "9 ms", "12 MB", "50%". Parsing and printing, one spelling each.

Size units are decimal (kB, MB, GB) or binary (KiB, MiB, GiB). A percentage is relative to the
dense model measured on the same target.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from autocomp.core.errors import UserError

Dimension = Literal["latency", "size", "peak_memory"]

_TO_MS = {"us": 1e-3, "\u00b5s": 1e-3, "\u03bcs": 1e-3, "ms": 1.0, "s": 1e3}  # micro sign, Greek mu
_TO_BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_PATTERN = re.compile(
    r"^\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z\u00b5\u03bc%]*)\s*$"
)
_EXAMPLE = {
    "latency": "'4 ms', '800 us' or '25%' of dense",
    "size": "'12 MB', '8 MiB' or '25%' of dense",
    "peak_memory": "'200 MB', '1 GiB' or '50%' of dense",
}


@dataclass(frozen=True)
class Limit:
    """An upper limit: `value` in ms or bytes, or a fraction of the dense model when `relative`."""

    value: float
    relative: bool

    def resolve(self, dense: float) -> float:
        """The absolute limit, given the dense model's measured figure in the same unit."""
        return self.value * dense if self.relative else self.value


def parse_limit(text: str | int | float, dimension: Dimension) -> Limit:
    """Parse a budget entry.

    Raises:
        UserError: if the text is no quantity of this dimension, or is not positive.
    """
    match = _PATTERN.match(text) if isinstance(text, str) else None
    units = _TO_MS if dimension == "latency" else _TO_BYTES
    if match is None or match.group(2) not in (*units, "%"):
        raise UserError(
            f"{text!r} is no {dimension.replace('_', ' ')}: write {_EXAMPLE[dimension]}"
        )
    number, unit = float(match.group(1)), match.group(2)
    if not 0 < number < math.inf:
        raise UserError(f"{text!r}: a {dimension} limit must be above zero and finite")
    if unit == "%":
        return Limit(number / 100, relative=True)
    return Limit(number * units[unit], relative=False)


def format_ms(value: float | None) -> str:
    """`1.234` → `1.23 ms`; three significant digits. `None` → `–`."""
    if value is None:
        return "–"
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def format_bytes(value: float | None) -> str:
    """`9876543` → `9.88 MB`, decimal units. `None` → `–`."""
    if value is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * scale:
            scaled = value / scale
            return f"{scaled:.3g} {unit}" if scaled < 100 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} B"


def format_limit(value: float, dimension: Dimension) -> str:
    """A limit, as short as `format_ms` and `format_bytes` write it, that `value` meets."""
    write = format_ms if dimension == "latency" else format_bytes
    for raised in (value, 1.005 * value):
        text = write(raised)
        if parse_limit(text, dimension).value >= value:
            break
    return text


def format_seconds(value: float | None) -> str:
    """`75` → `1m15s`. `None` → `–`."""
    if value is None:
        return "–"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
