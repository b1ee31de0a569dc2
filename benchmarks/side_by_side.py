"""Latencies of models that were measured on different days, measured again in turn.

A study's latencies are those of its hour: dense and a candidate a tenth of it, measured minutes
apart, have a ratio that is known to a few percent only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

ROUNDS = 7


def latencies_ms(trials: Mapping[str, tuple[Path, str]], base: str) -> dict[str, float]:
    """Latency of each model in ms, as a median of rounds of its ratio to that of `base`.

    Args:
        trials: name → directory of a study, id of a complete trial in it; all of one target.
        base: a name of these.
    """
    from autocomp.core.gate import Gate
    from autocomp.export.companions import Companions
    from autocomp.study.directory import Study
    from autocomp.targets import make_target, open_artifact

    studies = {name: Study.open(directory) for name, (directory, _) in trials.items()}
    spec, paths = studies[base].spec, studies[base].paths
    target = make_target(spec.target, Gate(paths.gate))
    inputs = Companions(paths.companions).inputs
    artifacts = {}
    for name, study in studies.items():
        found = next(record for record in study.trials() if record.id == trials[name][1])
        assert found.artifact is not None
        artifacts[name] = open_artifact(study.paths.root / found.artifact)
    rounds = [
        {name: target.measure(its, inputs).latency_ms or 0.0 for name, its in artifacts.items()}
        for _ in range(ROUNDS)
    ]
    base_ms = median(its[base] for its in rounds)
    return {name: base_ms * median(its[name] / its[base] for its in rounds) for name in artifacts}
