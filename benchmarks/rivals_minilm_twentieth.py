"""`rivals` for MiniLM at a twentieth of the latency and 4% of the size: see there.

What every layer keeps a quarter of is over this budget; the rivals that meet it keep few layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autocomp.core.candidate import Distillation
from benchmarks.rivals import Match, Recipe, run_match

QUARTER = {"embeddings": "rank", "rank": 0.25, "table": 4}
MORE = {"embeddings": "rank", "rank": 0.375, "table": 4, "bits": 4}
"""Layers in 4 bits leave bytes for more of the embeddings."""

ONE = Recipe(layers=(0,), width=0.5)
TWO = Recipe(layers=(0, 5), heads=0.5, width=0.25)
THREE = Recipe(layers=(0, 2, 5), heads=0.25, width=0.25)

MATCH = Match(
    "minilm_twentieth",
    {
        "uniform, 8 bits, a quarter of the embeddings' rank": Recipe(
            heads=0.25, width=0.25, **QUARTER
        ),
        "1 layer, half the width, 8 bits, a quarter of the rank": replace(ONE, **QUARTER),
        "2 layers, half the heads, a quarter of the width, 8 bits, a quarter of the rank": replace(
            TWO, **QUARTER
        ),
        "2 layers, half the heads, a quarter of the width, 4 bits, three eighths of it": replace(
            TWO, **MORE
        ),
        "3 layers, a quarter of heads and width, 8 bits, a quarter of the rank": replace(
            THREE, **QUARTER
        ),
    },
    usual=Distillation(lr=2e-4, temperature=2.0),
)


def run(options: Any) -> dict[str, float]:
    """The figures of `run_match`."""
    return run_match(MATCH)
