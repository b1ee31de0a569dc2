"""Full trials in this process: the artifact is the trained model, and a failure is a record."""

from __future__ import annotations

import errno
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import SETTINGS, SPEC, Command, ledger, stamps

from autocomp.api import prepare
from autocomp.api.library import prepare_library
from autocomp.api.plan import make_plan
from autocomp.core.candidate import Candidate, Distillation
from autocomp.core.errors import StorageError
from autocomp.core.gate import Gate
from autocomp.distill.known import known_side
from autocomp.distill.trainer import distil
from autocomp.library.stitch import stitch
from autocomp.report.progress import Silent
from autocomp.spec.loader import parse_overrides
from autocomp.study.activity import ActivityWriter, read_activities
from autocomp.study.directory import Study
from autocomp.targets import clock, open_artifact, timing
from autocomp.trial import runner as runner_module
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
    items = prepare_library(plan, teacher, no_cluster, Silent())
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
        known=known_side(
            runner.teacher,
            runner.task,
            calm.distillation,
            runner.paths.work,
            runner.gate,
            lambda done, total: None,
            same_tokens=True,
        ),
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

    teacher, student_ = log_softmax(np.asarray(runner.expected())), log_softmax(found)
    divergence = np.mean((np.exp(teacher) * (teacher - student_)).sum(-1))
    assert record["teacher_kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    assert math.isfinite(record["measured"]["latency_ms"])
    files = (runner.paths.root / record["artifact"]).iterdir()
    assert record["measured"]["size_bytes"] == sum(file.stat().st_size for file in files)


UNTRAINED = Distillation()


def test_a_full_disk_is_not_the_candidates_fault(
    runner: CandidateRunner, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record is kept, whoever meets the full disk; once there is space, the trial is run."""
    given = payload("full", replace(searched(finished), distillation=UNTRAINED))

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "artifact.onnx")

    target = runner.target()
    for place, name in ((target, "write"), (runner_module, "save_student"), (target, "measure")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, refuse)
            with pytest.raises(StorageError, match=r"artifact\.onnx: No space left on device"):
                runner.run(given)
    assert "full" not in trial_keys(runner)
    assert read_activities(runner.paths.running) == {}
    assert runner.run(given)["state"] == "complete"


def test_memory_that_ran_out_is_recorded_as_the_machines_failure(
    runner: CandidateRunner, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = payload("large", replace(searched(finished), distillation=UNTRAINED))

    def killed(command: list[str], **_: Any) -> Any:
        assert "autocomp.targets.peak_memory" in command
        return subprocess.CompletedProcess(command, -9, "", "")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", killed)
        record = runner.run(given)
    assert (record["state"], record["by_machine"]) == ("failed", True)
    assert "its process was killed, most often because memory ran out" in record["error"]
    record = runner.run(given)
    assert (record["state"], record["by_machine"]) == ("complete", False)
    assert trial_keys(runner)[-2:] == ["large#failed-1", "large"]


def test_a_trial_that_is_complete_is_returned_not_run_again(
    runner: CandidateRunner, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker dies between storing a trial and telling of it."""
    given = payload("twice", replace(searched(finished), distillation=UNTRAINED))
    first = runner.run(given)
    assert first["state"] == "complete"
    before = stamps(runner.paths.root)
    monkeypatch.setattr(runner, "_carry_out", pytest.fail)
    assert runner.run(given) == first
    assert stamps(runner.paths.root) == before


def test_every_phase_is_told_and_nothing_runs_beside_a_measurement(
    runner: CandidateRunner, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work in this process holds the gate; the work between two turns is too short to be seen."""
    candidate = replace(searched(finished), distillation=Distillation(tokens=400, lr=3e-4))
    told: list[str] = []
    turns = {"working": 0, "measuring": 0}
    held: set[str] = set()
    enter = ActivityWriter.enter

    def remember(self: ActivityWriter, phase: str) -> None:
        told.append(phase)
        enter(self, phase)

    def turn(name: str) -> Any:
        plain = getattr(Gate, name)

        @contextmanager
        def entered(self: Gate) -> Iterator[None]:
            with plain(self):
                outer = not held
                held.add(name)
                turns[name] += 1
                yield
                if outer:
                    held.clear()

        return entered

    def inside(place: Any, name: str, mode: str = "working") -> None:
        plain = getattr(place, name)

        def checked(*arguments: Any, **named: Any) -> Any:
            assert held == {mode}, f"{name} runs without the gate"
            return plain(*arguments, **named)

        monkeypatch.setattr(place, name, checked)

    monkeypatch.setattr(ActivityWriter, "enter", remember)
    monkeypatch.setattr(runner_module, "further", lambda *_: False)
    for name in turns:
        monkeypatch.setattr(Gate, name, turn(name))
    target = runner.target()
    inside(runner_module, "stitch")
    inside(runner_module, "save_student")
    for name in ("lower", "write", "run", "open"):
        inside(target, name)
    inside(runner.task, "logits")
    inside(subprocess, "run")
    inside(clock, "time_interleaved", "measuring")
    monkeypatch.setattr(timing, "ATTEMPTS", 1)
    record = runner.run(payload("gated", candidate))
    assert record["state"] == "complete", record["error"]
    assert told == ["teacher", "stitch", "rung", "distil", "rung", "export", "evaluate", "measure"]
    assert list(record["seconds"]) == list(dict.fromkeys(told[1:]))
    assert turns["measuring"] == 1
    batches = len(runner.task.splits["search"]) // runner.context.spec.target.workload.batch
    assert turns["working"] > batches, "evaluation gives way after every batch"


def test_a_trial_goes_on_from_its_rung_in_another_process_to_the_same_model(
    runner: CandidateRunner, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "further", lambda *_: False)  # what is trained is compared
    spec = runner.context.spec
    search = spec.search.model_copy(update={"rungs": [0.5], "realise": True})
    context = replace(runner.context, spec=spec.model_copy(update={"search": search}))
    runner.context = context
    settings = Distillation(tokens=2000, lr=3e-4, temperature=2.0)
    candidate = replace(searched(finished), distillation=settings)
    whole = runner.run(payload("whole", candidate))
    assert whole["state"] == "complete", whole["error"]
    assert list(whole["seconds"])[:3] == ["stitch", "rung", "distil"]

    running = runner.start(payload("cut", candidate))
    report = next(running)
    running.close()  # as far as what is on disk goes, killed
    assert runner.paths.checkpoint("cut").exists()
    other = CandidateRunner()
    other.setup({"trial": context})
    cut = other.run(payload("cut", candidate))
    assert cut["state"] == "complete", cut["error"]
    assert (cut["quality"], cut["teacher_kl"]) == (whole["quality"], whole["teacher_kl"])
    assert cut["rungs"] == whole["rungs"]
    assert cut["rungs"][0]["teacher_kl"] == report["teacher_kl"]
    assert not runner.paths.checkpoint("cut").exists()
    rungs = [entry["key"] for entry in ledger(runner.paths.root) if entry["kind"] == "rung"]
    assert rungs == ["whole@0", "cut@0"]


def trial_keys(runner: CandidateRunner) -> list[str]:
    return [entry["key"] for entry in ledger(runner.paths.root) if entry["kind"] == "trial"]
