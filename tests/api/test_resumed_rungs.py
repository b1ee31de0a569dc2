"""Trials that a killed search left at a rung: judged as they were, or would have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autocomp.api import trials
from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate
from autocomp.core.measurement import Measurement
from autocomp.search.rungs import Rungs
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study
from autocomp.study.records import RungRecord, TrialRecord

SPEC: dict[str, Any] = {
    "version": 1,
    "model": {"source": "m"},
    "task": {"name": "language-modeling", "data": {"source": "d"}},
    "budget": {"size": "10%"},
    "space": [{"match": "*"}],
}
COST = Measurement("estimated", 1.0, 1000)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.create_or_open(tmp_path / "study", Spec.model_validate(SPEC))


def see(study: Study, id: str, rung: int, kl: float) -> None:
    seen = RungRecord(
        id, "search", "milp", Candidate(()), COST, rung, 100 * (rung + 1), 0.5, kl, {}
    )
    study.ledger.append("rung", seen.key, seen.to_json())
    study.paths.checkpoint(id).parent.mkdir(parents=True, exist_ok=True)
    study.paths.checkpoint(id).touch()


def judged(study: Study) -> list[tuple[str, int]]:
    rungs = Rungs(0.5, Budget(), ["quality", "latency", "size"])
    return [(report.id, report.rung) for report in trials._judged_again(study, rungs)]


def test_one_that_was_worse_is_stopped_and_the_others_go_on(study: Study) -> None:
    see(study, "first", 0, 0.1)
    see(study, "first", 1, 0.1)
    see(study, "worse", 0, 0.3)  # the process died before this was judged
    see(study, "better", 0, 0.05)
    assert judged(study) == [("first", 1), ("better", 0)]
    (pruned,) = study.trials()
    assert (pruned.id, pruned.state) == ("worse", "pruned")
    assert pruned.error == "stopped after 100 tokens: others were better there"
    assert not study.paths.checkpoint("worse").exists()
    assert study.paths.checkpoint("better").exists()
    assert judged(study) == [("first", 1), ("better", 0)], "asked again, nothing changes"
    assert len(study.trials()) == 1


def test_the_checkpoints_of_trials_that_go_on_are_kept(study: Study) -> None:
    see(study, "first", 0, 0.1)
    assert [report.id for report in trials.begun(study)] == ["first"]
    ended = TrialRecord("first", "search", "milp", "failed", Candidate(()), error="diverged")
    study.add_trial(ended)
    assert trials.begun(study) == []
