"""One trial with a replaced layer, from the spec to the student that comes back. No workers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from autocomp.api import prepare
from autocomp.api.library import prepare_library
from autocomp.api.plan import make_plan
from autocomp.core.candidate import Candidate, Distillation, Option
from autocomp.library.stitch import stitch
from autocomp.library.student import load_student
from autocomp.models.seat import mixer_of
from autocomp.operators.replace import distil as distil_module
from autocomp.operators.replace.distil import Settings
from autocomp.report.progress import Silent
from autocomp.study.directory import Study
from autocomp.study.per_example import load_scores
from autocomp.study.records import TrialRecord
from autocomp.targets import open_artifact
from autocomp.trial import runner as runner_module
from autocomp.trial.runner import CandidateRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
from tiny_study import SPEC, ledger, sentences, write_model, write_rows

UNIT = "layers.0.attention"


class Notes(Silent):
    """Remembers what is worth attention."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def note(self, text: str) -> None:
        self.all.append(text)


def write_spec(root: Path) -> Path:
    spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    spec["model"]["source"] = str(write_model(root / "model"))
    spec["task"]["teacher"] = {"fit": "full", "epochs": 2, "lr": 2e-3, "batch": 16}
    spec["task"]["data"]["source"] = str(write_rows(root / "data.jsonl", sentences()))
    bits = {"method": "gptq", "weights": [8], "activations": [8]}
    spec["space"] = [{"match": UNIT, "structure": {"replace": ["hedgehog"]}, "bits": bits}]
    path = root / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def test_a_replaced_layer_goes_through_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distil_module, "SETTINGS", Settings(steps=6, trial_steps=2, check_every=3))

    def here(function: Any, tasks: Any, workers: int, advance: Any) -> list[Any]:
        return [function(task) for task in tasks]

    monkeypatch.setattr("autocomp.workers.tasks.run_tasks", here)
    # One layer of a tiny model loses nothing that training could win back.
    monkeypatch.setattr(runner_module, "further", lambda *_: False)
    plan = make_plan(write_spec(tmp_path))
    teacher, notes = prepare.prepare_teacher(plan, Silent()), Notes()
    study = Study.create_or_open(tmp_path / "study", plan.spec)
    cluster: Any = lambda: type("Cluster", (), {"workers": 1})()  # noqa: E731
    items = prepare_library(plan, teacher, cluster, notes, study.ledger)
    context = replace(prepare.prepare_context(plan, study, teacher), items=items)
    runner = CandidateRunner()
    runner.setup({"trial": context})

    option = next(
        option
        for option in plan.options[UNIT]
        if [step.operator for step in option.steps] == ["replace", "gptq"]
    )
    options = {unit.name: Option() for unit in plan.units} | {UNIT: option}
    untrained = Candidate.of(options)
    candidate = replace(untrained, distillation=Distillation(tokens=1000, lr=1e-3, temperature=2.0))
    payload = {
        "id": "replaced",
        "kind": "search",
        "proposed_by": "milp",
        "candidate": candidate.to_json(),
    }
    record = TrialRecord.from_json(runner.run(payload))
    assert record.state == "complete", record.error
    assert record.measured is not None
    assert record.measured.latency_ms > 0
    assert record.measured.peak_memory_bytes > record.measured.size_bytes > 0

    student, _ = load_student(study.paths.student("replaced"))
    unit = next(unit for unit in plan.units if unit.name == UNIT)
    mixer = mixer_of(student, unit)
    assert mixer is not None
    assert mixer.name == "hedgehog"
    before = stitch(runner.teacher, plan.units, runner.library, items, untrained)
    stitched = mixer_of(before, unit)
    assert stitched is not None
    moved = {n: t for n, t in mixer.state_dict().items() if not t.equal(stitched.state_dict()[n])}
    assert set(moved) == {"query_map", "key_map"}, "distillation of the whole reaches the mixer"

    # What was exported, evaluated and kept is one model; int8 rounds otherwise where it is run.
    artifact = open_artifact(study.paths.root / str(record.artifact))
    inputs = next(iter(runner.task.batches("search", 48, trim=False)))
    with torch.no_grad():
        expected = runner.task.logits(student, inputs).numpy()
        unlike = runner.task.logits(runner.teacher, inputs).numpy()
    found = runner.target().run(
        artifact, {name: inputs[name].numpy() for name in runner.task.input_names}
    )
    assert np.abs(found - expected).max() < 0.05 * expected.std()
    assert np.abs(found - unlike).max() > 0.05 * expected.std()
    labels = runner.task.splits["search"].labels
    assert record.quality == pytest.approx(np.mean(found.argmax(-1) == labels), abs=1e-6)
    kept = load_scores(study.paths.per_example("replaced", "search"))
    assert kept is not None
    np.testing.assert_array_equal(kept.values, found.argmax(-1) == labels)

    built = [entry["payload"] for entry in ledger(study.paths.root) if entry["kind"] == "built"]
    described = {entry["option"]: entry for entry in built}
    assert set(described) == {one.label() for one in plan.options[UNIT] if not one.dense}
    entry = described[option.label()]
    assert entry["unit"] == UNIT
    assert entry["seconds"] > 0
    assert entry["peak_bytes"] > 50e6  # torch alone
    assert entry["training"]["error"] <= entry["training"]["error_before"]
    assert entry["training"]["steps"] in (2, 3, 6)
    assert (
        described[next(label for label in described if "replace" not in label)]["training"] is None
    )
    (note,) = [note for note in notes.all if note.startswith("library:")]
    assert f"{len(built)} items built; slowest {UNIT} (" in note
