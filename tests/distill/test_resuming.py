"""A training that is sliced, saved and continued elsewhere ends where an uninterrupted one does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from model_examples import EXAMPLES
from replaced_examples import Distances, calm
from safetensors.torch import load_file, save_file
from text_examples import Texts
from torch import nn
from word_examples import CountingGate, Sentences, Words

from autocomp.core.candidate import Distillation
from autocomp.core.unit import SiteFormat
from autocomp.distill.checkpoint import CheckpointError
from autocomp.distill.trainer import DivergedError, Trainer, distil
from autocomp.models.modules import QuantLinear
from autocomp.models.seat import install_mixer, mixer_shape
from autocomp.models.surgery import copy_for_surgery
from autocomp.tasks.protocol import Task

SETTINGS = Distillation(tokens=600, lr=3e-2, temperature=2.0)
"""15 steps of 40 tokens: two and a half passes over 48 examples."""


@pytest.fixture
def teacher() -> Words:
    torch.manual_seed(0)
    model = Words().eval()
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


def student() -> Words:
    """A student with a quantised layer, always the same."""
    torch.manual_seed(5)
    weight = nn.Linear(8, 8).weight.detach()
    scales = weight.abs().amax(1, keepdim=True) / 7
    form = SiteFormat(rows=8, columns=8, bias=True, weight_bits=4)
    return Words(linear=QuantLinear(weight, torch.zeros(8), scales, form))


def trainer(
    model: nn.Module, teacher: nn.Module, settings: Distillation = SETTINGS, **changed: Any
) -> Trainer:
    given: dict[str, Any] = {"batch": 8, "seed": 3, "gate": CountingGate(), **changed}
    return Trainer(model, teacher, cast(Task, Sentences()), settings, **given)


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_slices_end_where_one_run_does(teacher: Words) -> None:
    whole, sliced = student(), student()
    expected = distil(
        whole, teacher, cast(Task, Sentences()), SETTINGS, batch=8, seed=3, gate=CountingGate()
    )
    slices = trainer(sliced, teacher)
    seen = [slices.advance(tokens).tokens for tokens in (1, 1, 240, 250, 480, 600)]
    assert seen == [40, 40, 240, 280, 480, 600], "whole steps; passes end at 240 and 480"
    assert equal(whole, sliced)
    assert slices.result == expected
    assert not equal(whole, student())


@pytest.mark.parametrize("after", [40, 200, 240, 280, 600])
def test_a_saved_training_goes_on_bit_for_bit(teacher: Words, tmp_path: Path, after: int) -> None:
    whole, first, second = student(), student(), student()
    expected = trainer(whole, teacher).advance(600)
    begun = trainer(first, teacher)
    begun.advance(after)
    begun.save(tmp_path / "half.safetensors")
    begun.advance(600)  # what is done with the first one afterwards is not in the file
    continued = trainer(second, teacher)
    with torch.no_grad():  # everything that is trained is read from the file
        for parameter in second.parameters():
            if parameter.requires_grad:
                parameter.fill_(3.0)
    continued.load(tmp_path / "half.safetensors")
    assert continued.result.tokens == after
    assert continued.advance(600) == expected
    assert equal(second, whole)
    assert not second.training


def test_nothing_goes_beyond_the_settings(teacher: Words) -> None:
    model = student()
    run = trainer(model, teacher)
    told: list[tuple[int, int]] = []
    assert run.advance(10_000, lambda *at: told.append(at)).tokens == 600
    assert told[-1] == (600, 600)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert run.advance(10_000).steps == 15
    assert all(torch.equal(trained[name], t) for name, t in model.state_dict().items())


def test_a_slice_tells_how_far_it_is_itself(teacher: Words) -> None:
    told: list[tuple[int, int]] = []
    trainer(student(), teacher).advance(100, lambda *at: told.append(at))
    assert told == [(40, 100), (80, 100), (100, 100)]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_transformer_with_a_mixer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    teacher = calm(EXAMPLES[name].model())
    unit = next(u for u in EXAMPLES[name].units() if u.name == "layers.1.attention")
    task: Any = Texts(name)
    settings = Distillation(tokens=2000, lr=3e-3, temperature=1.0)

    def made() -> tuple[nn.Module, Trainer]:
        model = copy_for_surgery(teacher)
        torch.manual_seed(0)
        install_mixer(model, unit, Distances(mixer_shape(unit)))
        return model, Trainer(model, teacher, task, settings, batch=24, seed=0, gate=CountingGate())

    whole, run = made()
    run.advance(2000)
    run = made()[1]
    half = run.advance(900)
    run.save(tmp_path / "half.safetensors")
    again, run = made()
    run.load(tmp_path / "half.safetensors")
    assert half.tokens < run.advance(2000).tokens
    assert equal(again, whole)


def saved(teacher: Words, path: Path) -> Path:
    begun = trainer(student(), teacher)
    begun.advance(200)
    begun.save(path / "half.safetensors")
    return path / "half.safetensors"


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (
            {"settings": replace(SETTINGS, lr=1e-2)},
            r"settings is .*0\.03.* there and .*0\.01",
        ),
        ({"settings": replace(SETTINGS, tokens=900)}, r"settings is .*600.* there and .*900"),
        ({"seed": 4}, "seed is 3 there and 4 here"),
        ({"batch": 16}, "batch is 8 there and 16 here"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    teacher: Words, tmp_path: Path, changed: dict[str, Any], complaint: str
) -> None:
    path, model = saved(teacher, tmp_path), student()
    run = trainer(model, teacher, **changed)
    with pytest.raises(CheckpointError, match=complaint):
        run.load(path)
    assert run.result.tokens == 0
    assert equal(model, student()), "what was refused changed nothing"


def test_a_checkpoint_of_another_student_is_refused(teacher: Words, tmp_path: Path) -> None:
    path = saved(teacher, tmp_path)
    narrow = nn.Sequential()
    narrow.add_module("first", nn.Linear(8, 4))
    narrow.add_module("second", nn.Linear(4, 8))
    run = trainer(Words(linear=narrow), teacher)
    with pytest.raises(CheckpointError, match=r"linear\.bias is \(8,\) there and absent here"):
        run.load(path)
    wide = student()
    wide.head = nn.Linear(8, 5)
    run = trainer(wide, teacher)
    with pytest.raises(CheckpointError, match=r"head\.bias is \(3,\) there and \(5,\) here"):
        run.load(path)


def test_a_damaged_checkpoint_is_refused(teacher: Words, tmp_path: Path) -> None:
    path = saved(teacher, tmp_path)
    run = trainer(student(), teacher)
    whole = path.read_bytes()
    for content in (b"", whole[:-7], b"{}" * 50):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            run.load(path)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        run.load(tmp_path / "absent.safetensors")
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path, metadata={"other": "thing"})
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        run.load(path)
    header = {"format": 99, "about": {}, "training": {}}
    save_file(tensors, path, metadata={"distillation": json.dumps(header)})
    with pytest.raises(CheckpointError, match="has format 99"):
        run.load(path)


def test_saving_leaves_nothing_else_behind_and_replaces(teacher: Words, tmp_path: Path) -> None:
    run = trainer(student(), teacher)
    for tokens in (40, 80):
        run.advance(tokens)
        run.save(tmp_path / "half.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["half.safetensors"]
    other = trainer(student(), teacher)
    other.load(tmp_path / "half.safetensors")
    assert other.result == run.result


def test_divergence_is_judged_at_the_end_of_the_training(teacher: Words) -> None:
    """However it is sliced: a slice may end where the loss is for a moment high."""
    torch.manual_seed(1)
    run = trainer(Words(), teacher, replace(SETTINGS, tokens=2000, lr=1000))
    assert run.advance(1000).last_loss > 10
    with pytest.raises(DivergedError, match=r"the loss rose from .* learning rate 1000$"):
        run.advance(2000)


def test_a_training_without_tokens_is_a_mistake(teacher: Words) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        trainer(student(), teacher, Distillation())
