"""`search_quality.enumerated`: see there."""

from __future__ import annotations

from typing import Any

from benchmarks.search_quality.enumerated import figures


def run(options: Any) -> dict[str, float]:
    """The figures of `figures`."""
    return figures()
