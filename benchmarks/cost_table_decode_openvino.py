"""`cost_table_decode` on the second runtime."""

from __future__ import annotations

from typing import Any

from benchmarks import cost_table_decode


def run(options: Any) -> dict[str, float]:
    """Errors over the candidates."""
    return cost_table_decode.measure("openvino")
