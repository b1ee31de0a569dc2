"""Trials that leave the finite numbers: a record with the reason; the next one runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from autocomp.api import prepare
from autocomp.api.plan import make_plan
from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Distillation, Option, Step
from autocomp.distill.trainer import Trainer
from autocomp.front import choose, front
from autocomp.front.view import noise_on_search, study_front
from autocomp.library.student import load_student
from autocomp.report.progress import Silent
from autocomp.study.directory import Study
from autocomp.study.per_example import load_scores
from autocomp.trial import runner as runner_module
from autocomp.trial.runner import CandidateRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
from tiny_study import SPEC, sentences, write_model, write_rows

SHORTER = ("layers.0.attention", "layers.0.ffn")


class Built:
    """A study of the tiny model and a runner; candidates are dense, so nothing is built."""

    def __init__(self, root: Path) -> None:
        spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
        spec["model"]["source"] = str(write_model(root / "model"))
        spec["task"]["teacher"] = {"fit": "full", "epochs": 6, "lr": 3e-3, "batch": 16}
        spec["task"]["data"]["source"] = str(write_rows(root / "data.jsonl", sentences()))
        path = root / "spec.yaml"
        path.write_text(yaml.safe_dump(spec), encoding="utf-8")
        plan = make_plan(path)
        teacher = prepare.prepare_teacher(plan, Silent())
        self.study = Study.create_or_open(root / "study", plan.spec)
        self.options = {unit.name: Option() for unit in plan.units}
        self.runner = CandidateRunner()
        self.runner.setup({"trial": prepare.prepare_context(plan, self.study, teacher)})

    def run(self, id: str, lr: float = 3e-4, skipped: Sequence[str] = ()) -> dict[str, Any]:
        settings = Distillation(tokens=2000, lr=lr, temperature=2.0)
        options = self.options | dict.fromkeys(skipped, Option((Step.of("skip"),)))
        candidate = Candidate.of(options, settings)
        given = {"id": id, "kind": "search", "proposed_by": "milp"}
        return self.runner.run({**given, "candidate": candidate.to_json()})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("failed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AUTOCOMP_CACHE", str(root / "cache"))
        yield Built(root)


def wild(trainer: Trainer, *_: Any, **__: Any) -> None:
    """Training that ends in NaN without its loss having said so."""
    for parameter in trainer._student.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)


def deaf(*_: Any, **__: Any) -> np.ndarray[Any, Any]:
    return np.full((1, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("name", "lr", "spoil", "reason"),
    [
        ("rate", 10.0, None, "distillation diverged"),
        ("trained", 3e-4, "distil", "logits are not finite"),
        ("exported", 3e-4, "run", "not finite for"),
    ],
)
def test_it_fails_with_its_reason_and_the_search_goes_on(
    built: Built,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    lr: float,
    spoil: str | None,
    reason: str,
) -> None:
    if spoil == "distil":
        monkeypatch.setattr(Trainer, "advance", wild)
    elif spoil == "run":
        monkeypatch.setattr(runner_module, "check_agreement", lambda *_: None)
        spoilt: Callable[..., Any] = deaf
        monkeypatch.setattr(built.runner.target(), "run", spoilt)
    record = built.run(name, lr)
    assert (record["state"], record["by_machine"]) == ("failed", False)
    assert reason in record["error"]
    assert "Traceback" not in record["error"]
    assert record["quality"] is record["measured"] is record["artifact"] is None
    assert not built.study.paths.per_example(name, "search").exists()
    monkeypatch.undo()

    calm = built.run(f"after-{name}")
    assert calm["state"] == "complete", calm["error"]
    kept = load_scores(built.study.paths.per_example(f"after-{name}", "search"))
    assert kept is not None
    assert kept.values.mean() == calm["quality"]

    records = built.study.trials()
    assert name not in [trial.id for trial in front(records)]
    taken = choose(records, Budget(), noise_on_search(built.study, records)).record
    assert taken.id.startswith("after-")
    (shown,) = [trial for trial in study_front(built.study)["trials"] if trial["id"] == name]
    assert shown["quality_low"] is shown["quality"] is None
    assert not shown["feasible"]
    assert built.study.failed_by_machine() == [], "another attempt would end the same way"


def test_training_that_leads_away_from_the_teacher_is_undone(built: Built) -> None:
    """A dense student is the teacher before training; one without its first layer has to learn."""
    alike, shorter = built.run("alike"), built.run("shorter", skipped=SHORTER)
    assert (alike["undone"], shorter["undone"]) == (True, False)
    assert alike["teacher_kl"] < 1e-6 < shorter["teacher_kl"]
    teacher = built.runner.teacher.state_dict()

    def moved(id: str) -> bool:
        student, _ = load_student(built.study.paths.student(id))
        return any(not tensor.equal(teacher[name]) for name, tensor in student.state_dict().items())

    assert (moved("alike"), moved("shorter")) == (False, True)
