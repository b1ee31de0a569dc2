"""`cost_table` where every family of operators is offered: `search_spaces/all_operators.yaml`.

Rank, fixed ranges, sparse weights and a smaller vocabulary beside heads, width, skipping and bits.
"""

from __future__ import annotations

from typing import Any

from benchmarks import cost_table


def run(options: Any) -> dict[str, float]:
    """Errors over the candidates."""
    return cost_table.measure("onnxruntime", "all_operators")
