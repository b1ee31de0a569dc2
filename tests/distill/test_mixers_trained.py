"""Whole students whose attention was replaced: mixers learn too, and padding teaches nothing."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from model_examples import EXAMPLES
from replaced_examples import Distances, calm
from text_examples import Texts
from word_examples import CountingGate

from autocomp.core.candidate import Distillation
from autocomp.distill.student import MIXER_RATE, parameter_groups, trainable_parameters
from autocomp.distill.trainer import distil
from autocomp.models.seat import install_mixer, mixer_of, mixer_shape
from autocomp.models.surgery import copy_for_surgery
from autocomp.tasks.protocol import Task


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mixers_are_trained_with_the_rest(name: str) -> None:
    teacher = calm(EXAMPLES[name].model())
    unit = next(u for u in EXAMPLES[name].units() if u.name == "layers.1.attention")
    student = copy_for_surgery(teacher)
    torch.manual_seed(0)
    install_mixer(student, unit, Distances(mixer_shape(unit)))
    padded = copy.deepcopy(student)
    task: Any = Texts(name)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    settings = Distillation(tokens=2000, lr=3e-3, temperature=1.0)
    result = distil(
        student, teacher, cast(Task, task), settings, batch=24, seed=0, gate=CountingGate()
    )
    assert result.last_loss < 0.7 * result.first_loss
    mixer = mixer_of(student, unit)
    assert mixer is not None
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.endswith("mixer.scores") for n in changed)
    assert unit.causal is (name == "llama")
    for inputs in task.all:  # what stands at padding makes no difference
        mask = inputs["attention_mask"]
        inputs["input_ids"] = torch.where(mask.bool(), inputs["input_ids"], 7)
    distil(padded, teacher, cast(Task, task), settings, batch=24, seed=0, gate=CountingGate())
    other = mixer_of(padded, unit)
    assert other is not None
    torch.testing.assert_close(other.scores, mixer.scores, rtol=1e-3, atol=1e-4)


def test_mixers_have_a_rate_of_their_own() -> None:
    unit = EXAMPLES["bert"].units()[1]
    student = EXAMPLES["bert"].model()
    plain = parameter_groups(student, trainable_parameters(student).values(), 1e-4)
    assert [group["lr"] for group in plain] == [1e-4]
    mixer = Distances(mixer_shape(unit))
    install_mixer(student, unit, mixer)
    groups = parameter_groups(student, trainable_parameters(student).values(), 1e-4)
    assert [group["lr"] for group in groups] == [1e-4, MIXER_RATE * 1e-4]
    assert [id(p) for p in groups[1]["params"]] == [id(mixer.scores)]
