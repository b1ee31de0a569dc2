"""How early trials can be told apart: rank correlations with how they end.

Trials of the quickstart that are looked at on the way and never stopped. Correlated (Spearman) are
the screening KL, before any training, and the KL at each rung with the KL and the accuracy of the
exported model. Accuracies are turned round, so that 1 is always perfect. Trials that were proposed
without screening count at the rungs only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from autocomp.search.screening import Screened
from benchmarks.setting import SPACES, lines

SHARES = (0.125, 0.25, 0.5)
OVERRIDES = {
    "search.rungs": list(SHARES),
    "search.keep": 1.0,
    "search.trials": 16,
    "distill.tokens": [80_000],
}


def run(options: Any) -> dict[str, float]:
    """`{screening|rung_12|…}_{kl|quality}`: Spearman with the trials' ends."""
    from autocomp.api.prepare import cache_directory
    from autocomp.api.search import search

    root = cache_directory() / "benchmarks" / "rank_flips"
    search(SPACES / "quickstart.yaml", root, overrides=OVERRIDES, progress=lines())
    return figures(root)


def figures(directory: Path) -> dict[str, float]:
    """Of a study with rungs that stopped nobody."""
    from autocomp.study.directory import Study

    study = Study.open(directory)
    known = study.ledger.read()
    screened = {item.key: item.kl for item in map(Screened.from_json, known.of("screen").values())}
    trials = [
        trial
        for trial in study.trials()
        if trial.state == "complete" and len(trial.rungs) == len(SHARES)
    ]
    kls = [screened.get(trial.candidate.stitch_key) for trial in trials]
    early: dict[str, list[Any]] = {"screening": kls}
    for number, share in enumerate(SHARES):
        early[f"rung_{round(100 * share)}"] = [t.rungs[number]["teacher_kl"] for t in trials]
    ends: dict[str, list[Any]] = {
        "kl": [trial.teacher_kl for trial in trials],
        "quality": [-(trial.quality or 0.0) for trial in trials],
    }
    found: dict[str, float] = {}
    for name, values in early.items():
        seen = [at for at, value in enumerate(values) if value is not None]
        for end, last in ends.items():
            pair = [values[at] for at in seen], [last[at] for at in seen]
            found[f"{name}_{end}"] = spearman(*pair)
    screens = sum(kl is not None for kl in kls)
    return {"trials": float(len(trials)), "screened": float(screens), **found}


def spearman(left: list[Any], right: list[Any]) -> float:
    """Rank correlation; ties share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(np.array(left, float), np.array(right, float)).statistic)
