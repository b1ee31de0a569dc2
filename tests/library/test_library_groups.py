"""Shared keys and values in the library: trained once, stored whole, stitched, kept as students."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_examples import logits
from replaced_examples import Case, case

from autocomp.core.candidate import Candidate, Option, Step
from autocomp.library.build import BuildPlan, build, plan_build
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.library.student import load_student, save_student, teacher_digest
from autocomp.operators import apply_step, step_versions
from autocomp.operators.replace import distil as distil_module
from autocomp.operators.replace.distil import Settings
from autocomp.testing.operator_contract import assert_same

ONE, HALF = Step.of("groups", keep=1), Step.of("groups", keep=2)
EIGHT = Step.of("gptq", weights=8, activations=32, group=0)
ALONE, ROUNDED = Option((ONE,)), Option((ONE, EIGHT))


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Short training; the units that were trained."""
    calls: list[str] = []
    original = distil_module.train

    def counted(unit, *arguments):  # type: ignore[no-untyped-def]
        calls.append(unit.name)
        return original(unit, *arguments)

    monkeypatch.setattr(distil_module, "SETTINGS", Settings(steps=4, trial_steps=1, check_every=2))
    monkeypatch.setattr(distil_module, "train", counted)
    return calls


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case("bert", tmp_path_factory.mktemp("bert"))


def plan(one: Case, library: Library, *options: Option) -> BuildPlan:
    path = one.stats.recording.with_name(f"{one.unit.name}.safetensors")
    return plan_build(
        one.path, [one.unit], {one.unit.name: options}, {one.unit.name: path}, "s", library
    )


def test_trained_once_and_stored_with_how_it_went(
    bert: Case, tmp_path: Path, trained: list[str]
) -> None:
    library = Library(tmp_path)
    built = plan(bert, library, ALONE, ROUNDED, Option((HALF, EIGHT)), Option((EIGHT,)))
    assert [task.trains for task in built.tasks] == [True, True, False]
    assert built.recorded == [bert.unit.name]
    items = {item.option.key: item for item in build(built)}
    assert len(trained) == 2
    prefix = library.get(built.keys[bert.unit.name, ALONE.key])
    rounded = library.get(built.keys[bert.unit.name, ROUNDED.key])
    assert prefix is not None
    assert rounded is not None
    assert_same(apply_step(bert.unit, prefix, EIGHT, dict(bert.stats)), rounded, "rounded")
    key, output = bert.unit.site("key"), bert.unit.site("output")
    assert key is not None
    assert output is not None
    training = prefix[output.name].training
    assert training is not None
    assert training.stats is not None
    later = rounded[output.name].training
    assert later is not None
    assert later.stats is None  # nothing is built on it
    error = training.report["error"]
    assert items[ALONE.key].error == {**dict.fromkeys(prefix, 0.0), output.name: error}
    assert 0 < items[ROUNDED.key].error[key.name] < 0.01
    assert error < items[ROUNDED.key].error[output.name] < error + 0.01
    info = library.describe(built.keys[bert.unit.name, ALONE.key])
    assert info is not None
    assert info["training"]["curve"][0][0] == 0
    assert info["option"] == {"groups": {"keep": 1}}
    assert step_versions(ROUNDED)["groups"] == 1


@pytest.mark.parametrize("option", [ALONE, ROUNDED], ids=["float", "8 bits"])
def test_a_student_comes_back(bert: Case, tmp_path: Path, option: Option) -> None:
    library = Library(tmp_path / "library")
    built = plan(bert, library, option)
    build(built)
    candidate = Candidate.of({bert.unit.name: option})
    student = stitch(bert.model, [bert.unit], library, built.keys, candidate)
    about = {
        "teacher": str(bert.path),
        "digest": teacher_digest(bert.path),
        "task": bert.example.task,
        "num_labels": bert.example.labels,
    }
    path = tmp_path / "student.safetensors"
    save_student(path, student, bert.model, bert.example.units(), about)
    loaded, _ = load_student(path)
    inputs = bert.batches[0]
    expected = logits(student, inputs)
    assert torch.equal(logits(loaded, inputs), expected)
    assert (expected - logits(bert.model, inputs)).abs().max() > 1e-3
