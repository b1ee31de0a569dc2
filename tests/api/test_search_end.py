"""How a search ends where nothing fits, and what it says on the way: phases are stood in for."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autocomp.api import prepare, trials
from autocomp.api.search import _Search
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import InfeasibleError
from autocomp.core.measurement import Measurement
from autocomp.front.pick import NothingFitsError
from autocomp.report.progress import Silent
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study
from autocomp.study.records import TrialRecord

DENSE = TrialRecord(
    "dense",
    "dense",
    "baseline",
    "complete",
    Candidate.of({"head": Option()}),
    quality=0.02,
    metric={"name": "perplexity", "value": 50.0},
    measured=Measurement("measured", 10.0, 1000),
)
SMALL = replace(
    DENSE,
    id="small",
    kind="uniform",
    candidate=Candidate.of({"head": Option((Step.of("rtn", weights=8),))}),
    quality=0.0125,
    metric={"name": "perplexity", "value": 80.0},
    measured=Measurement("measured", 4.0, 300),
)


class Audience(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def spec_of(budget: dict[str, Any], trials: int = 3) -> Spec:
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"source": "m"},
            "task": {"name": "language-modeling", "data": {"source": "d"}},
            "budget": budget,
            "space": [{"match": "*"}],
            "search": {"trials": trials},
        }
    )


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A search whose dense model is measured; what follows is given by the test."""

    def make(budget: dict[str, Any], then: Any) -> tuple[Study, Audience, _Search]:
        spec = spec_of(budget)
        study = Study.create_or_open(tmp_path / "study", spec)
        study.add_trial(DENSE)
        plan: Any = SimpleNamespace(spec=spec, runtimes=(None,), notes=())
        monkeypatch.setattr(prepare, "prepare_teacher", lambda *_: None)
        monkeypatch.setattr(prepare, "prepare_context", lambda *_: None)
        monkeypatch.setattr(prepare, "measure_dense", lambda *_: (DENSE, None))
        monkeypatch.setattr(_Search, "_chosen", lambda *_: then(study))
        audience = Audience()
        made = _Search(plan, study, audience, ExitStack(), None, None, None)
        return study, audience, made

    return make


def test_the_front_is_written_when_no_measured_model_fits(search: Any) -> None:
    from autocomp.front.pick import pick
    from autocomp.front.view import study_budget

    def then(study: Study) -> TrialRecord:
        study.add_trial(SMALL)
        return pick(study.trials(), study_budget(study))

    study, _, made = search({"size": "10%", "latency": "90%"}, then)
    with pytest.raises(NothingFitsError, match="Nearest: small") as caught:
        made.run()
    assert caught.value.binding == "size_bytes"
    front = json.loads((study.paths.root / "front.json").read_text())
    assert front["nearest"] == {"id": "small", "binding": "size_bytes"}
    assert [trial["id"] for trial in front["trials"]] == ["dense", "small"]
    assert "perplexity" in study.paths.front_html.read_text()
    assert study.ledger.read().of("report") == {}


def test_the_front_is_written_when_nothing_is_within_reach(search: Any) -> None:
    def then(study: Study) -> TrialRecord:
        raise InfeasibleError("the smallest in this space is larger")

    study, _, made = search({"size": "1%"}, then)
    with pytest.raises(InfeasibleError, match="the smallest in this space"):
        made.run()
    assert json.loads((study.paths.root / "front.json").read_text())["dense"] == "dense"


@pytest.mark.parametrize(
    ("floor", "noted"),
    [
        (1 / 45, True),
        (1 / 50, False),
        (1 / 90, False),
        ("perplexity 45", True),
        (f"{5000 / 45}%", True),
        ("100%", False),
    ],
)
def test_a_floor_above_the_teacher_is_noted(search: Any, floor: float | str, noted: bool) -> None:
    def then(study: Study) -> TrialRecord:
        raise InfeasibleError("the end of this test")

    _, audience, made = search({"quality": floor}, then)
    with pytest.raises(InfeasibleError):
        made.run()
    expected = ["the budget asks for perplexity ≤ 45, the dense model itself has perplexity 50"]
    assert [note.partition(": a compressed")[0] for note in audience.notes] == expected * noted


@pytest.mark.parametrize(("asked", "rounds"), [(0, 1), (3, 3)])
def test_no_trials_are_not_made_more_where_nothing_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, rounds: int
) -> None:
    spec = spec_of({"size": "10%"}, asked)
    study = Study.create_or_open(tmp_path / "study", spec)
    study.add_trial(DENSE)
    dispatched: list[Any] = []
    extended: list[int] = []
    proposer = SimpleNamespace(extend=extended.append)
    monkeypatch.setattr(trials, "_baselines", lambda *_: [])
    monkeypatch.setattr(trials, "TrialProposer", lambda *_, **__: proposer)
    monkeypatch.setattr(trials, "_dispatch", lambda *call: dispatched.append(call))
    audience = Audience()
    audience.phase = lambda *_: None  # type: ignore[method-assign]
    plan: Any = SimpleNamespace(spec=spec, space=None)
    session: Any = SimpleNamespace(plan=plan, study=study, progress=audience, deadline=None)
    budget = spec.budget.limits().resolve(DENSE.measured)  # type: ignore[arg-type]
    measured: Any = SimpleNamespace(tables={}, budget=budget, context=None)
    trials.run_trials(session, measured, [], None)  # type: ignore[arg-type]
    assert len(dispatched) == rounds
    assert len(extended) == len(audience.notes) == rounds - 1
