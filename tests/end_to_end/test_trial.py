"""Full trials in this process: the artifact is the trained model, and a failure is a record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import SETTINGS, SPEC, Command, ledger

from autocomp.api import prepare
from autocomp.api.plan import make_plan
from autocomp.core.candidate import Candidate, Distillation
from autocomp.core.gate import Gate
from autocomp.library.stitch import stitch
from autocomp.report.progress import Silent
from autocomp.spec.loader import parse_overrides
from autocomp.study.directory import Study
from autocomp.targets import open_artifact
from autocomp.trial.distil import distil
from autocomp.trial.runner import CandidateRunner

pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one


@pytest.fixture
def runner(
    command: Command,
    cut_back: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> CandidateRunner:
    """A worker's runner on a study that has its dense trial; nothing needs to be built."""

    def no_cluster() -> Any:
        raise AssertionError("the library is complete, so no worker is needed")

    monkeypatch.setenv("AUTOCOMP_CACHE", str(command.cache))
    study_path = cut_back()
    given = (f"model.source={command.model}", f"task.data.source={command.data}", *SETTINGS)
    plan = make_plan(SPEC, parse_overrides(given))
    teacher = prepare.prepare_teacher(plan, Silent())
    items = prepare.prepare_library(plan, teacher, no_cluster, Silent())
    study = Study.create_or_open(study_path, plan.spec)
    context = replace(prepare.prepare_context(plan, study, teacher), items=items)
    assert set(context.references) == {None}
    made = CandidateRunner()
    made.setup({"trial": context})
    return made


def searched(finished: Path) -> Candidate:
    """A candidate the search tried, with pruned, quantised and dense units."""
    front = json.loads((finished / "front.json").read_text())
    trial = next(trial for trial in front["trials"] if trial["kind"] == "search")
    return Candidate.from_json(trial["candidate"])


def payload(id: str, candidate: Candidate) -> dict[str, Any]:
    return {
        "id": id,
        "kind": "search",
        "proposed_by": "milp",
        "candidate": candidate.to_json(),
        "estimated": None,
    }


def test_a_diverging_trial_fails_with_its_reason_and_the_next_one_runs(
    runner: CandidateRunner, finished: Path
) -> None:
    candidate = searched(finished)
    wild = replace(candidate, distillation=Distillation(tokens=2000, lr=1e3, temperature=2.0))
    record = runner.run(payload("wild", wild))
    assert record["state"] == "failed"
    assert "distillation diverged: the loss rose from" in record["error"]
    assert "learning rate 1000" in record["error"]
    assert record["measured"] is None
    assert record["artifact"] is None

    calm = replace(candidate, distillation=Distillation(tokens=2000, lr=3e-4, temperature=2.0))
    record = runner.run(payload("calm", calm))
    assert record["state"] == "complete", record["error"]
    entries = [entry for entry in ledger(runner.paths.root) if entry["kind"] == "trial"]
    assert [entry["key"] for entry in entries] == ["dense", "wild#failed-1", "calm"]
    assert entries[2]["payload"] == record

    # What was exported is what was trained, here trained once more.
    student = stitch(
        runner.teacher, runner.context.units, runner.library, runner.context.items, calm
    )
    distil(
        student,
        runner.teacher,
        runner.task,
        calm.distillation,
        batch=runner.context.spec.distill.batch,
        seed=runner.context.spec.search.seed,
        gate=Gate(runner.paths.gate),
        teacher_logits=runner._distil_logits(calm),
    )
    artifact = open_artifact(runner.paths.root / record["artifact"])
    inputs = next(iter(runner.task.batches("search", 48, trim=False)))
    with torch.no_grad():
        expected = runner.task.logits(student, inputs).numpy()
    found = runner.target().run(
        artifact, {name: inputs[name].numpy() for name in runner.task.input_names}
    )
    assert np.abs(found - expected).max() < 0.1 * expected.std()
    labels = runner.task.splits["search"].labels
    assert record["quality"] == pytest.approx(np.mean(found.argmax(-1) == labels), abs=1e-6)

    def log_softmax(logits: Any) -> Any:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    teacher, student_ = log_softmax(np.asarray(runner.expected)), log_softmax(found)
    divergence = np.mean((np.exp(teacher) * (teacher - student_)).sum(-1))
    assert record["teacher_kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert math.isfinite(record["measured"]["latency_ms"])
    files = (runner.paths.root / record["artifact"]).iterdir()
    assert record["measured"]["size_bytes"] == sum(file.stat().st_size for file in files)
