"""The controller's share of a search: the time that is neither a trial nor scoring or screening.

Over the phases that make up a search once everything is prepared (scores, screening, trials,
report), from the times the ledger keeps. Of scoring and screening, what the controller did not
spend waiting for the workers' answers is overhead; of trials, what the trials themselves do not
account for, divided by the workers (so the start of the workers, and a worker that idles while the
last trial ends, are overhead too); the report is overhead as a whole.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.setting import SPACES

WORKERS = 2
REDUCED = {"search.screen": 200, "search.trials": 4, "distill.tokens": [40000]}
COUNTED = ("scores", "screening", "trials", "report")


def run(options: Any) -> dict[str, float]:
    """Figures of the study given, or of a reduced quickstart."""
    if options.study is not None:
        return figures(options.study)
    from autocomp.api.search import search

    with TemporaryDirectory(prefix="autocomp-benchmark-") as directory:
        study = Path(directory) / "study"
        search(SPACES / "quickstart.yaml", study, workers=WORKERS, overrides=REDUCED)
        return figures(study)


def figures(path: Path, workers: int = WORKERS) -> dict[str, float]:
    """Shares of the time of a study that was searched in one go by `workers` workers."""
    from autocomp.study.directory import Study

    study = Study.open(path)
    seconds = dict.fromkeys(COUNTED, 0.0)
    waited = 0.0
    preparation = 0.0
    for payload in study.ledger.read().of("phase").values():
        if payload["name"] in seconds:
            seconds[payload["name"]] += payload["seconds"]
            waited += payload["waited_s"]
        else:
            preparation += payload["seconds"]
    trials = [trial for trial in study.trials() if trial.kind != "dense"]
    working = sum(sum(trial.seconds.values()) for trial in trials) / workers
    whole = sum(seconds.values())
    return {
        "preparation_s": preparation,
        "scores_s": seconds["scores"],
        "screening_s": seconds["screening"],
        "trials_s": seconds["trials"],
        "report_s": seconds["report"],
        "search_s": whole,
        "screened": len(study.ledger.read().of("screen")),
        "trials": len(trials),
        "overhead_screening_s": seconds["scores"] + seconds["screening"] - waited,
        "overhead_trials_s": seconds["trials"] - working,
        "overhead_percent": 100 * (whole - waited - working) / whole,
    }
