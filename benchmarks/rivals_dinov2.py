"""`rivals` for DINOv2-small at a budget that whole-model 8 bits cannot meet: see there."""

from __future__ import annotations

from typing import Any

from autocomp.core.candidate import Distillation
from benchmarks.rivals import Match, Recipe, run_match

MATCH = Match(
    "vit_cpu",
    {
        "uniform, 8 bits": Recipe(heads=0.5, width=0.5),
        "uniform, 4 bits": Recipe(heads=0.5, width=0.5, bits=4),
        "8 layers, 8 bits": Recipe(layers=(0, 1, 2, 4, 6, 8, 10, 11)),
        "8 layers, half the width": Recipe(layers=(0, 1, 2, 4, 6, 8, 10, 11), width=0.5),
        "6 layers, 8 bits": Recipe(layers=(0, 2, 4, 6, 8, 11)),
    },
    usual=Distillation(lr=1e-4, temperature=2.0),
)


def run(options: Any) -> dict[str, float]:
    """The figures of `run_match`."""
    return run_match(MATCH)
