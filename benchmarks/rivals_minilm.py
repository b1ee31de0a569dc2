"""`rivals` for MiniLM at a tenth of the latency and 7% of the size: see there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autocomp.core.candidate import Distillation
from benchmarks.rivals import Match, Recipe, run_match

UNIFORM = Recipe(heads=0.25, width=0.25)
THREE = Recipe(layers=(0, 2, 5), width=0.25)
TWO = Recipe(layers=(0, 5), width=0.5)
HALF = {"embeddings": "rank", "rank": 0.5, "table": 4}
MORE = {"embeddings": "rank", "rank": 0.75, "table": 4, "bits": 4}
"""Layers in 4 bits leave bytes for more of the embeddings."""

MATCH = Match(
    "minilm_tenth",
    {
        "uniform, 8 bits, half of the embeddings' rank": replace(UNIFORM, **HALF),
        "uniform, 4 bits, three quarters of the embeddings' rank": replace(UNIFORM, **MORE),
        "3 layers, a quarter of the width, 8 bits, half of the rank": replace(THREE, **HALF),
        "3 layers, a quarter of the width, 4 bits, three quarters of the rank": replace(
            THREE, **MORE
        ),
        "2 layers, half the width, 8 bits, half of the rank": replace(TWO, **HALF),
        "2 layers, half the width, 4 bits, three quarters of the rank": replace(TWO, **MORE),
        "uniform, 8 bits, the task's vocabulary": replace(UNIFORM, embeddings="vocabulary"),
        "2 layers, half the width, 8 bits, the task's vocabulary": replace(
            TWO, embeddings="vocabulary"
        ),
    },
    usual=Distillation(lr=2e-4, temperature=2.0),
)


def run(options: Any) -> dict[str, float]:
    """The figures of `run_match`."""
    return run_match(MATCH)
