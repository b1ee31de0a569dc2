"""`mixers` for one model: see there."""

from __future__ import annotations

from typing import Any

from benchmarks.mixers import run_model


def run(options: Any) -> dict[str, float]:
    """The figures of `run_model`."""
    return run_model("dinov2")
