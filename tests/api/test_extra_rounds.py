"""Rounds that follow while nothing fits the budget: the total is raised before they run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocomp.api import trials
from autocomp.api.session import Measured, Session
from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate
from autocomp.core.measurement import Measurement
from autocomp.report.progress import Silent
from autocomp.search.scores import Scores
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study
from autocomp.study.records import TrialKind, TrialRecord

SPEC: dict[str, Any] = {
    "version": 1,
    "model": {"source": "some/model"},
    "task": {"name": "text-classification", "data": {"source": "some-data"}},
    "budget": {"latency": "20%"},
    "space": [{"match": "layers.*", "structure": {"width": [1.0, 0.5]}}],
    "search": {"trials": 4},
}


class Audience(Silent):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int | None]] = []
        self.stages: list[dict[str, int]] = []

    def phase(self, name: str, total: int | None = None) -> None:
        assert name == "trials"
        self.steps.append((0, total))

    def advance(self, done: int, total: int | None = None) -> None:
        self.steps.append((done, total))

    def funnel(self, **counts: int) -> None:
        self.stages.append(counts)


def too_slow(name: str, kind: TrialKind = "search") -> TrialRecord:
    measured = Measurement("measured", 9.0, 1000)
    return TrialRecord(name, kind, "milp", "complete", Candidate(()), 0.9, measured=measured)


class Proposer:
    """Allows as many trials as it was told."""

    def __init__(self, *_: Any, trials: int, finished: list[TrialRecord], **__: Any) -> None:
        self.allowed = trials
        self.asked = sum(record.kind == "search" for record in finished)

    def extend(self, trials: int) -> None:
        self.allowed += trials


def search(study: Study, monkeypatch: pytest.MonkeyPatch) -> Audience:
    audience = Audience()
    made: list[Proposer] = []

    def make(*arguments: Any, **named: Any) -> Proposer:
        made.append(Proposer(*arguments, **named))
        return made[-1]

    def dispatch(*_: Any) -> None:
        if all(record.kind != "uniform" for record in study.trials()):
            study.add_trial(too_slow("uniform-int8", "uniform"))
        while made[0].asked < made[0].allowed:
            study.add_trial(too_slow(f"trial-{made[0].asked}"))
            made[0].asked += 1

    monkeypatch.setattr(trials, "TrialProposer", make)
    monkeypatch.setattr(trials, "_dispatch", dispatch)
    monkeypatch.setattr(
        trials,
        "_baselines",
        lambda *_: [("dense", "dense", None), ("uniform-int8", "uniform", None)],
    )
    plan = SimpleNamespace(spec=study.spec, space=None)
    session = SimpleNamespace(plan=plan, study=study, progress=audience, deadline=None)
    measured = SimpleNamespace(context=None, budget=Budget(latency_ms=1.0), tables={})
    trials.run_trials(cast(Session, session), cast(Measured, measured), [], Scores({}))
    return audience


def test_the_total_grows_with_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.create_or_open(tmp_path / "study", Spec.model_validate(SPEC))
    study.add_trial(too_slow("dense", "dense"))
    audience = search(study, monkeypatch)
    assert audience.steps == [(0, 5), (0, 5), (5, 7), (7, 9)]
    assert audience.stages == [{"stitched": 0, "distilled": 0, "measured": 0, "on_front": 0}]

    resumed = search(study, monkeypatch)
    assert resumed.steps == [(0, 5), (9, 9), (9, 9), (9, 9)], "done already, never more than all"
    assert resumed.stages[0]["measured"] == 9
