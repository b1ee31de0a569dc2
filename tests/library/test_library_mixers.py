"""Replaced units in the library: trained once, stored whole, stitched, and kept as students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_examples import logits
from replaced_examples import Case, Distances, case

from autocomp.core.candidate import Candidate, Option, Step
from autocomp.library.build import BuildPlan, build, plan_build
from autocomp.library.stitch import stitch
from autocomp.library.store import Library, item_key
from autocomp.library.student import load_student, save_student, teacher_digest
from autocomp.models.mixers.protocol import Mixer
from autocomp.models.seat import install_mixer, mixer_of
from autocomp.models.surgery import copy_for_surgery, dense_linear, replace_module
from autocomp.operators import apply_step
from autocomp.operators.replace import distil as distil_module
from autocomp.operators.replace.distil import Settings
from autocomp.testing.operator_contract import assert_same

ELU, DISTANCES = Step.of("replace", mixer="elu"), Step.of("replace", mixer="distances")
EIGHT = Step.of("gptq", weights=8, activations=32, group=0)
FOUR = Step.of("gptq", weights=4, activations=32, group=16)
ALONE = Option((DISTANCES,))
COMPOSITES = (
    Option((DISTANCES, EIGHT)),
    Option((DISTANCES, FOUR)),
    Option((ELU, EIGHT)),
    Option((EIGHT,)),
)


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Short training; the names of the mixers that were trained."""
    calls: list[str] = []
    original = distil_module.distil

    def counted(unit, state, mixer, recording):  # type: ignore[no-untyped-def]
        calls.append(mixer.name)
        return original(unit, state, mixer, recording)

    monkeypatch.setattr(distil_module, "SETTINGS", Settings(steps=4, trial_steps=1, check_every=2))
    monkeypatch.setattr(distil_module, "distil", counted)
    return calls


@pytest.fixture(scope="module", params=["bert", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case("bert", tmp_path_factory.mktemp("only-bert"))


def plan(one: Case, library: Library, options: Sequence[Option] = COMPOSITES) -> BuildPlan:
    path = one.stats.recording.with_name(f"{one.unit.name}.safetensors")
    return plan_build(
        one.path, [one.unit], {one.unit.name: options}, {one.unit.name: path}, "s", library
    )


def test_a_prefix_is_trained_once_and_stored_though_only_composites_are_asked_for(
    bert: Case, tmp_path: Path, trained: list[str]
) -> None:
    library = Library(tmp_path)
    first = plan(bert, library)
    assert [task.trains for task in first.tasks] == [True, True, False]
    assert first.recorded == [bert.unit.name]
    assert first.weight == first.weight_of(3) > first.weight_of(2) > first.weight_of(1) > 100
    items = build(first)
    assert sorted(trained) == ["distances", "elu"]
    assert len(items) == first.missing == 4
    assert len(library.keys()) == 6
    assert plan(bert, library).tasks == []
    again = plan(bert, library, [ALONE])  # it is there, though nobody had asked for it
    assert again.tasks == []
    info = library.describe(again.keys[bert.unit.name, ALONE.key])
    assert info is not None
    assert info["training"]["curve"][0][0] == 0
    assert info["option"] == {"replace": {"mixer": "distances"}}


def test_an_interrupted_build_trains_nothing_twice(
    bert: Case, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, put, count = Library(tmp_path), Library.put, 0

    def interrupted(self: Library, *arguments: object, **named: object) -> int:
        nonlocal count
        count += 1
        if count == 3:  # the prefix and the first composite are stored
            raise KeyboardInterrupt
        return put(self, *arguments, **named)  # type: ignore[arg-type]

    options = (ALONE, *COMPOSITES[:2])
    with monkeypatch.context() as patch:
        patch.setattr(Library, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(plan(bert, library, options))
    assert trained == ["distances"]
    rest = plan(bert, Library(tmp_path), options)
    assert rest.missing == 1
    assert rest.recorded == []
    bert.stats.recording.rename(bert.stats.recording.with_suffix(".gone"))  # and is not needed
    try:
        build(rest)
    finally:
        bert.stats.recording.with_suffix(".gone").rename(bert.stats.recording)
    assert trained == ["distances"]
    other = Library(tmp_path / "other")
    whole = plan(bert, other, options)
    build(whole)
    for option in options:
        key = whole.keys[bert.unit.name, option.key]
        left, right = Library(tmp_path).get(key), other.get(key)
        assert left is not None
        assert right is not None
        assert_same(left, right, option.label())


def test_a_composite_is_its_stored_prefix_and_then_the_rest(made: Case, tmp_path: Path) -> None:
    library = Library(tmp_path)
    options = (ALONE, *COMPOSITES)
    built = plan(made, library, options)
    items = {item.option.key: item for item in build(built)}
    prefix = library.get(built.keys[made.unit.name, ALONE.key])
    assert prefix is not None
    name = next(site.name for site in made.unit.sites if site.role == "output")
    assert prefix[name].mixer is not None
    trained = prefix[name].training
    assert trained is not None
    assert trained.stats is not None
    for step in (EIGHT, FOUR):
        option = Option((DISTANCES, step))
        stored = library.get(built.keys[made.unit.name, option.key])
        assert stored is not None
        assert stored[name].mixer is not None
        assert stored[name].training is not None
        assert stored[name].training.stats is None  # nothing is built on it
        assert_same(apply_step(made.unit, prefix, step, dict(made.stats)), stored, option.label())
    training = trained.report
    assert {key for key, item in items.items() if item.training == training} == {
        option.key for option in options if option.steps[0] == DISTANCES
    }
    assert items[COMPOSITES[3].key].training is None
    query = next(site.name for site in made.unit.sites if site.role == "query")
    assert items[ALONE.key].error == {**dict.fromkeys(prefix, 0.0), name: training["error"]}
    eight, four = items[COMPOSITES[0].key].error, items[COMPOSITES[1].key].error
    assert 0 < eight[query] < four[query] < 0.1
    assert training["error"] < eight[name] < four[name]


def test_an_item_comes_back_as_it_was_put(made: Case, tmp_path: Path) -> None:
    state = apply_step(made.unit, made.state, DISTANCES, made.stats)
    library = Library(tmp_path)
    library.put("ab" + "0" * 38, state)
    loaded = Library(tmp_path).get("ab" + "0" * 38)
    assert loaded is not None
    assert_same(state, loaded, "stored")
    name = next(site.name for site in made.unit.sites if site.role == "output")
    one, other = state[name].mixer, loaded[name].mixer
    assert one is not None
    assert other is not None
    assert set(other.parameters) == {"scores", "scale"}
    before, after = state[name].training, loaded[name].training
    assert before is not None
    assert after is not None
    assert before.stats is not None
    assert after.stats is not None
    assert before.stats.count == after.stats.count
    for part in ("gram", "mean", "low", "high", "sample"):
        assert torch.equal(getattr(before.stats, part), getattr(after.stats, part))
    assert after.report["error"] == before.report["error"]


def test_the_key_holds_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {item_key("w", option, "s") for option in (ALONE, Option((ELU,)))}
    monkeypatch.setattr(Distances, "version", 4)
    keys |= {item_key("w", option, "s") for option in (ALONE, Option((ELU,)))}
    assert len(keys) == 3


def test_stitched_equals_installed_by_hand(made: Case, tmp_path: Path) -> None:
    library = Library(tmp_path)
    built = plan(made, library, [ALONE])
    build(built)
    model = stitch(
        made.model,
        [made.unit],
        library,
        built.keys,
        Candidate.of({made.unit.name: ALONE}),
    )
    state = library.get(built.keys[made.unit.name, ALONE.key])
    assert state is not None
    assert sorted(state) == sorted(s.name for s in made.unit.sites if s.role != "key")
    by_hand = copy_for_surgery(made.model)
    brought = next(site.mixer for site in state.values() if site.mixer is not None)
    mixer = Distances(brought.shape)
    mixer.load_state_dict(dict(brought.parameters))
    for name, site in state.items():
        replace_module(by_hand, name, dense_linear(site.weight, site.bias))
    install_mixer(by_hand, made.unit, mixer)
    inputs = made.batches[0]
    assert torch.equal(logits(model, inputs), logits(by_hand, inputs))
    assert not torch.allclose(logits(model, inputs), logits(made.model, inputs), atol=1e-3)


@pytest.mark.parametrize("option", [ALONE, COMPOSITES[1]], ids=["float", "4 bits"])
def test_a_trained_student_comes_back(made: Case, tmp_path: Path, option: Option) -> None:
    library = Library(tmp_path / "library")
    built = plan(made, library, [option])
    build(built)
    candidate = Candidate.of({made.unit.name: option})
    student = stitch(made.model, [made.unit], library, built.keys, candidate)
    mixer = mixer_of(student, made.unit)
    assert isinstance(mixer, Distances)
    with torch.no_grad():
        mixer.scores = torch.nn.Parameter(mixer.scores + 0.5)
        mixer.scale = mixer.scale * 0.9
    about = {
        "teacher": str(made.path),
        "digest": teacher_digest(made.path),
        "task": made.example.task,
        "num_labels": made.example.labels,
    }
    units = made.example.units()
    save_student(tmp_path / "student.safetensors", student, made.model, units, about)
    loaded, _ = load_student(tmp_path / "student.safetensors")
    inputs = made.batches[0]
    torch.testing.assert_close(logits(loaded, inputs), logits(student, inputs))
    back = mixer_of(loaded, made.unit)
    assert isinstance(back, Mixer)
    assert back.shape == mixer.shape
    assert torch.equal(back.state_dict()["scores"], mixer.scores)


def test_install_refuses_a_state_without_what_the_mixer_reads(made: Case) -> None:
    from autocomp.models.surgery import install

    state = apply_step(made.unit, made.state, DISTANCES, made.stats)
    short = {name: site for name, site in state.items() if site.mixer is not None}
    with pytest.raises(ValueError, match="the state holds"):
        install(copy_for_surgery(made.model), made.unit, short)
    softmax = {name: replace(site, mixer=None) for name, site in state.items()}
    with pytest.raises(ValueError, match="the state holds"):
        install(copy_for_surgery(made.model), made.unit, softmax)
