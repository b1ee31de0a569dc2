"""`rivals` for the small Llama at a budget that whole-model 8 bits cannot meet: see there."""

from __future__ import annotations

from typing import Any

from autocomp.core.candidate import Distillation
from benchmarks.rivals import Match, Recipe, run_match

MATCH = Match(
    "llama_cpu",
    {
        "uniform, 8 bits": Recipe(heads=0.5, width=0.5, table=4),
        "uniform, 4 bits": Recipe(heads=0.5, width=0.5, bits=4, table=4),
        "4 layers, 4 bits": Recipe(layers=(0, 1, 3, 5), bits=4, table=4),
        "4 layers, half the width": Recipe(layers=(0, 1, 3, 5), width=0.5, bits=4, table=4),
        "3 layers, 4 bits": Recipe(layers=(0, 2, 5), bits=4, table=4),
    },
    usual=Distillation(lr=3e-4, temperature=1.0),
)


def run(options: Any) -> dict[str, float]:
    """The figures of `run_match`."""
    return run_match(MATCH)
