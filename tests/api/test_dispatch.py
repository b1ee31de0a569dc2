"""The dispatcher: what the machine failed is not held against a candidate; the funnel's counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from autocomp.api.dispatch import Dispatcher, stages
from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Distillation, Option, Step
from autocomp.core.measurement import Measurement
from autocomp.front.pick import front
from autocomp.report.progress import Silent
from autocomp.search.proposal import Proposal
from autocomp.search.rungs import Rungs
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study, append_trial
from autocomp.study.records import RungRecord, TrialRecord
from autocomp.workers.protocol import Failure

SPEC = {
    "version": 1,
    "model": {"source": "some/model"},
    "task": {"name": "text-classification", "data": {"source": "some-data"}},
    "budget": {"latency": "20%"},
    "space": [{"match": "layers.*", "structure": {"width": [1.0, 0.5]}}],
}


def candidate(keep: int, tokens: int = 1000) -> Candidate:
    return Candidate.of(
        {"layers.0.ffn": Option((Step.of("width", keep=keep),))}, Distillation(tokens=tokens)
    )


def record(
    name: str, *phases: str, keep: int = 8, tokens: int = 1000, **fields: Any
) -> TrialRecord:
    complete = "measure" in phases
    measured = Measurement("measured", float(keep), 1000 * keep) if complete else None
    return TrialRecord(
        name,
        fields.pop("kind", "search"),
        "milp",
        "complete" if complete else "failed",
        candidate(keep, tokens),
        quality=0.5 + keep / 100 if complete else None,
        measured=measured,
        seconds=dict.fromkeys(phases, 1.0),
        **fields,
    )


def test_each_count_is_what_its_word_says() -> None:
    whole = ("stitch", "distil", "export", "evaluate", "measure")
    records = [
        record("dense", *whole, keep=99, tokens=0, kind="dense"),
        record("uniform-int8", *whole, keep=4, tokens=0, kind="uniform"),
        record("good", *whole, keep=6),
        record("not stitched", "stitch", error="a width is missing"),
        record("diverged", "stitch", "distil", error="distillation diverged"),
        record("disagrees", "stitch", "distil", "export", error="the exported model differs"),
        record("died", error="the worker process died", by_machine=True),
    ]
    assert stages(records) == {"stitched": 4, "distilled": 2, "measured": 2, "on_front": 2}
    assert stages([]) == {"stitched": 0, "distilled": 0, "measured": 0, "on_front": 0}


class OneProposal:
    """A proposer with one trial in flight."""

    def __init__(self) -> None:
        self.told: list[TrialRecord] = []
        self.in_flight = [Proposal("8a6b", "search", candidate(6), "evolution", None)]

    def tell(self, id: str, outcome: TrialRecord) -> None:
        self.told.append(outcome)


@pytest.mark.parametrize("died", [True, False])
def test_a_worker_that_keeps_dying_is_the_machines_failure(tmp_path: Path, died: bool) -> None:
    study = Study.create_or_open(tmp_path / "study", Spec.model_validate(SPEC))
    proposer = OneProposal()
    dispatcher = Dispatcher(study, cast(Any, proposer), {}, Silent(), None)
    dispatcher.tell("8a6b", None, Failure("it came to nothing", died))
    (found,) = study.trials()
    assert proposer.told == [found]
    assert (found.state, found.by_machine) == ("failed", died)
    assert found.error is not None
    assert found.error.startswith("it came to nothing")
    assert ("memory ran out" in found.error) is died
    assert [again.id for again in study.failed_by_machine()] == (["8a6b"] if died else [])


def test_who_is_worse_at_a_rung_is_recorded_as_pruned_and_told(tmp_path: Path) -> None:
    study = Study.create_or_open(tmp_path / "study", Spec.model_validate(SPEC))
    proposer = OneProposal()
    rungs = Rungs(0.5, Budget(), ["quality", "latency", "size"])
    dispatcher = Dispatcher(study, cast(Any, proposer), {}, Silent(), None, rungs)

    def report(id: str, kl: float) -> dict[str, Any]:
        cost = Measurement("estimated", 1.0, 1000)
        seen = RungRecord(id, "search", "milp", candidate(6), cost, 0, 250, 0.5, kl, {"distil": 2})
        study.ledger.append("rung", seen.key, seen.to_json())
        return seen.to_json()

    assert dispatcher.judge("first", report("first", 0.1))
    assert study.trials() == []
    study.paths.checkpoint("8a6b").parent.mkdir(parents=True)
    study.paths.checkpoint("8a6b").touch()
    assert not dispatcher.judge("8a6b", report("8a6b", 0.2))
    (found,) = study.trials()
    assert proposer.told == [found]
    assert (found.id, found.state, found.proposed_by) == ("8a6b", "pruned", "milp")
    assert (found.quality, found.measured) == (None, None)
    assert found.rungs == ({"rung": 0, "tokens": 250, "quality": 0.5, "teacher_kl": 0.2},)
    assert found.seconds == {"distil": 2}
    assert found.error == "stopped after 250 tokens: others were better there"
    assert not study.paths.checkpoint("8a6b").exists()


def test_a_diverged_trial_is_told_as_failed_and_not_tried_again(tmp_path: Path) -> None:
    spec = Spec.model_validate(SPEC)
    study = Study.create_or_open(tmp_path / "study", spec)
    proposer = OneProposal()
    dispatcher = Dispatcher(study, cast(Any, proposer), {}, Silent(), None)
    diverged = record("8a6b", "stitch", "distil", error="distillation diverged at step 3")
    append_trial(study.ledger, diverged)  # by the worker, before it returns
    dispatcher.tell("8a6b", diverged.to_json(), None)
    assert [(told.state, told.error) for told in proposer.told] == [("failed", diverged.error)]
    assert study.failed_by_machine() == []
    assert front(study.trials()) == []
