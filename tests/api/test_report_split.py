"""The end of a search on made-up answers: the report split, and what `front` and `pick` say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autocomp.api.finish import open_report_split
from autocomp.api.opened import open_study
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import UserError
from autocomp.core.measurement import Measurement
from autocomp.report.progress import Silent
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study
from autocomp.study.per_example import load_scores, save_scores
from autocomp.study.records import TrialRecord
from autocomp.tasks.protocol import Evaluation, Quality

COUNT = 800
LABELS = {"search": np.arange(COUNT), "report": np.arange(COUNT) + 7}
WRONG = {"dense": range(100), "best": range(120), "simple": range(20, 142)}
"""Of either split."""
OPTIONS = {"dense": 0, "best": 6, "simple": 2}


def right(id: str) -> np.ndarray:
    scores = np.ones(COUNT)
    scores[list(WRONG[id])] = 0
    return scores


def record(id: str) -> TrialRecord:
    dense = id == "dense"
    steps = [Option((Step.of("width", keep=i + 1),)) for i in range(OPTIONS[id])] or [Option()]
    return TrialRecord(
        id,
        "dense" if dense else "search",
        "milp",
        "complete",
        Candidate.of({f"u{i}": steps[i % len(steps)] for i in range(6)}),
        quality=float(right(id).mean()),
        metric={"name": "accuracy", "value": float(right(id).mean())},
        measured=Measurement("measured", 10.0 if dense else 3.0, 1000 if dense else 100),
        artifact=f"artifacts/{id}",
    )


class FakeTask:
    """Knows of each artifact what it gets right; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.splits = {name: SimpleNamespace(labels=labels) for name, labels in LABELS.items()}

    def evaluate(self, run: Any, split: str) -> Evaluation:
        name = run({})
        self.asked.append((name, split))
        scores = right(name)
        value = float(scores.mean())
        return Evaluation(Quality(value, "accuracy", value, scores))


class FakeTarget:
    def run(self, artifact: Any, inputs: Any) -> str:
        return str(artifact.path.parent.name)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A study with its trials, and what opens its report split for some of them."""
    data = {
        "version": 1,
        "model": {"source": "m"},
        "task": {"name": "text-classification", "data": {"source": "d"}},
        "budget": {"latency": "50%"},
        "space": [{"match": "*"}],
    }
    study = Study.create_or_open(tmp_path / "study", Spec.model_validate(data))
    for name in WRONG:
        study.add_trial(record(name))
        save_scores(study.paths.per_example(name, "search"), right(name), LABELS["search"])
    task = FakeTask()
    monkeypatch.setattr("autocomp.tasks.make_task", lambda *_: task)
    monkeypatch.setattr("autocomp.models.vocabulary.load_vocabulary", lambda _: None)
    monkeypatch.setattr(
        "autocomp.targets.open_artifact", lambda path: SimpleNamespace(path=path / "model")
    )

    def close(*ids: str) -> None:
        plan = SimpleNamespace(spec=study.spec, model_path=None)
        session: Any = SimpleNamespace(study=study, plan=plan, progress=Silent())
        context: Any = SimpleNamespace(target=lambda runtime: FakeTarget())
        open_report_split(session, context, [record(name) for name in ids])

    return study, task, close


def test_the_report_split_is_opened_once_for_dense_and_the_chosen(finished: Any) -> None:
    study, task, close = finished
    assert open_study(study.paths.root).pick().record.id == "simple"
    for _ in range(2):
        close("dense", "simple")
    assert task.asked == [("dense", "report"), ("simple", "report")]
    kept = load_scores(study.paths.per_example("simple", "report"))
    assert kept is not None
    np.testing.assert_array_equal(kept.values, right("simple"))
    report = open_study(study.paths.root).front()["report"]
    assert report["ratio"] == pytest.approx(678 / 700)
    gaps = right("simple") - right("dense")
    error = gaps.std() / np.sqrt(COUNT) / right("dense").mean()
    assert report["ratio_low"] == pytest.approx(report["ratio"] - 1.96 * error, abs=0.2 * error)
    assert report["ratio_high"] == pytest.approx(report["ratio"] + 1.96 * error, abs=0.2 * error)
    assert (report["candidates"], report["examples"]) == (1, COUNT)


def test_pick_says_what_it_did(finished: Any) -> None:
    study, _, close = finished
    close("dense", "simple")
    opened = open_study(study.paths.root)
    picked, plain = opened.pick(), opened.pick(best=True)
    assert (picked.record.id, plain.record.id) == ("simple", "best")
    data = picked.to_json()
    assert data["selection"]["best"] == "best"
    assert data["report"] == opened.front()["report"]
    row = next(trial for trial in opened.front()["trials"] if trial["id"] == "simple")
    assert data.pop("budget") == opened.front()["budget"]
    assert {k: v for k, v in data.items() if k not in ("selection", "report")} == row
    assert plain.to_json()["selection"]["chosen"] == "best"
    assert plain.to_json()["report"] is None, "the split was not opened for it"
    assert opened.pick(latency="40%").record.id == "simple"
    limits = {"latency": "40%", "quality": "97%"}
    assert opened.pick(**limits).record.id == "best", "the other keeps 96.9% of dense"
    assert opened.pick(quality="96%").record.id == "best", "a floor alone: the fastest"
    assert opened.pick(quality="96%").to_json()["selection"]["least"] == "latency"
    assert opened.pick(quality="96%", best=True).record.id == "dense"
    with pytest.raises(UserError, match="give one of them"):
        opened.pick(best=True, least="size")


def forget(study: Study) -> None:
    shutil.rmtree(study.paths.root / "per_example")


def cut(study: Study) -> None:
    for path in (study.paths.root / "per_example").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("lose", [forget, cut])
def test_without_per_example_scores_all_is_as_it_was(
    finished: Any, lose: Callable[[Study], None]
) -> None:
    study, _, close = finished
    close("dense", "best")
    lose(study)
    opened = open_study(study.paths.root)
    assert opened.pick().record.id == opened.front()["chosen"] == "best"
    assert opened.front()["selection"] is None
    assert opened.front()["report"]["ratio"] == pytest.approx(680 / 700)
    assert opened.front()["report"]["ratio_low"] is None
    assert all(trial["quality_low"] is None for trial in opened.front()["trials"])


def test_scores_of_another_attempt_are_left_aside(finished: Any) -> None:
    """A worker that dies between its two writes leaves scores of no recorded trial."""
    study, _, _ = finished
    path = study.paths.per_example("simple", "search")
    save_scores(path, right("dense"), LABELS["search"])
    view = open_study(study.paths.root).front()
    assert view["chosen"] == "best"
    assert [row["id"] for row in view["selection"]["finalists"]] == ["best"]


def test_the_search_opens_the_split_for_what_pick_takes(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("autocomp.api.search")  # the package has a function of this name
    study, _, _ = finished
    monkeypatch.setattr(module, "within_reach", lambda *_: {})
    monkeypatch.setattr(module._Search, "_tables", lambda *_: {})
    monkeypatch.setattr("autocomp.api.library.prepare_library", lambda *_: {})
    monkeypatch.setattr("autocomp.api.screening.score_and_screen", lambda *_: ([], None))
    monkeypatch.setattr("autocomp.api.trials.run_trials", lambda *_: None)
    monkeypatch.setattr(module, "Measured", lambda *_: None)
    monkeypatch.setattr(module, "replace", lambda *_, **__: None)
    made = module._Search.__new__(module._Search)
    made.session = SimpleNamespace(plan=None, study=study, progress=Silent())
    budget = study.spec.budget.limits().resolve(replace(record("dense")).measured)
    chosen = made._chosen(None, None, budget)
    assert chosen.id == open_study(study.paths.root).pick().record.id == "simple"
