"""Distillation on a model of two layers: the loss, what is trained, how long, and divergence."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from word_examples import CLASSES, CountingGate, Sentences, Words

from autocomp.core.candidate import Distillation
from autocomp.core.unit import SiteFormat
from autocomp.distill.known import Known
from autocomp.distill.student import trainable_parameters
from autocomp.distill.trainer import DivergedError, Trainer, distil
from autocomp.models.modules import QuantEmbedding, QuantLinear
from autocomp.tasks.protocol import Task


def run(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tokens: int = 2000,
    lr: float = 3e-2,
    seed: int = 0,
    logits: np.ndarray[Any, Any] | None = None,
    gate: CountingGate | None = None,
) -> tuple[Any, Sentences]:
    task = Sentences()
    result = distil(
        student,
        teacher,
        cast(Task, task),
        Distillation(tokens=tokens, lr=lr, temperature=2.0),
        batch=8,
        seed=seed,
        gate=gate or CountingGate(),
        known=None if logits is None else Known(logits),
    )
    return result, task


@pytest.fixture
def teacher() -> Words:
    torch.manual_seed(0)
    model = Words().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(2)
        model.head.weight.mul_(6)
    return model


def test_the_student_approaches_the_teacher_and_embeddings_stay(teacher: Words) -> None:
    torch.manual_seed(1)
    student = Words(embedding=nn.Embedding.from_pretrained(teacher.embedding.weight.clone()))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result, _ = run(student, teacher)
    assert result.last_loss < 0.2 * result.first_loss
    after = student.state_dict()
    assert torch.equal(after["embedding.weight"], before["embedding.weight"])
    assert not torch.equal(after["linear.weight"], before["linear.weight"])
    assert not student.training


def in_eight_bits(words: Words) -> Words:
    """`words` with its linear layer in 8 bits, activations too."""
    form = SiteFormat(rows=8, columns=8, bias=True, weight_bits=8, activation_bits=8)
    linear = words.linear
    assert isinstance(linear, nn.Linear)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    words.linear = cast(Any, QuantLinear(weight, bias, scales, form))
    return words


@torch.no_grad()
def test_between_two_slices_the_student_is_what_was_trained(teacher: Words) -> None:
    """Looked at in evaluation mode, it shows its weights of now, not a rounding of earlier ones."""
    student = in_eight_bits(Words()).eval()
    inputs = next(iter(Sentences().batches("transfer", 8)))

    def seen(model: nn.Module) -> torch.Tensor:
        out: torch.Tensor = cast(Any, Sentences()).logits(model, inputs)
        return out

    settings = Distillation(tokens=2000, lr=3e-2, temperature=2.0)
    trainer = Trainer(
        student, teacher, cast(Task, Sentences()), settings, batch=8, seed=0, gate=CountingGate()
    )
    before = seen(student)
    for tokens in (400, 800):
        with torch.enable_grad():
            trainer.advance(tokens)
        found = seen(student)
        assert not torch.equal(found, before)
        assert torch.equal(found, seen(copy.deepcopy(student)))
        before = found


def test_rates_of_dropout_are_zero_wherever_a_model_keeps_them(teacher: Words) -> None:
    student = Words()
    student.linear.attention_dropout = 0.3  # type: ignore[assignment]
    student.linear.dropout = nn.Dropout(0.2)
    run(student, teacher, tokens=40)
    assert student.linear.attention_dropout == 0.0
    assert student.linear.dropout.p == 0.0


def test_tokens_are_real_ones_and_every_step_passes_the_gate(teacher: Words) -> None:
    gate = CountingGate()
    result, task = run(Words(), teacher, tokens=390, gate=gate)
    assert result.tokens == 400  # whole batches of 8 × 5
    assert result.steps == gate.entered == 10
    assert task.seeds == [0, 1], "six steps to an epoch, each shuffled anew"


def test_no_tokens_leave_the_student_as_it_is(teacher: Words) -> None:
    student = Words()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result, task = run(student, teacher, tokens=0)
    assert (result.tokens, result.steps, task.seeds) == (0, 0, [])
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())


def test_what_the_student_shares_with_the_teacher_is_not_trained_in_place(teacher: Words) -> None:
    student = Words()
    for own, shared in zip(student.parameters(), teacher.parameters(), strict=True):
        own.data = shared.data
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    run(student, teacher)
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    assert not torch.equal(student.linear.weight, teacher.linear.weight)


def test_a_head_tied_to_the_table_stays_tied_and_fixed(teacher: Words) -> None:
    student = Words(embedding=nn.Embedding(CLASSES, 8))
    student.head.weight = cast(nn.Embedding, student.embedding).weight
    before = student.head.weight.detach().clone()
    task = Sentences()
    task.ids %= CLASSES
    gate = CountingGate()
    settings = Distillation(tokens=400, lr=1e-2, temperature=2.0)
    distil(student, teacher, cast(Task, task), settings, batch=8, seed=0, gate=gate)
    assert student.head.weight is student.embedding.weight
    assert torch.equal(student.head.weight, before)


def test_the_same_seed_gives_the_same_student(teacher: Words) -> None:
    students = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        student = Words()
        run(student, teacher, seed=seed, tokens=600)
        students.append(student.head.weight.detach().clone())
    assert torch.equal(students[0], students[1])
    assert not torch.equal(students[0], students[2])


def test_known_logits_of_the_teacher_stand_in_for_it(teacher: Words) -> None:
    known = teacher(Sentences().ids).detach().numpy()
    weights = []
    for logits, model in ((None, teacher), (known, Words())):  # the second teacher is never asked
        torch.manual_seed(5)
        student = Words()
        run(student, model, logits=logits, tokens=600)
        weights.append(student.head.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_divergence_ends_the_trial_with_its_cause(teacher: Words) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step \d+ .* learning rate 1e\+38"):
        run(Words(), teacher, lr=1e38)


@pytest.mark.parametrize(("lr", "tokens"), [(10, 400), (1000, 2000)])
def test_a_loss_that_blew_up_but_stayed_finite_is_divergence(
    teacher: Words, lr: int, tokens: int
) -> None:
    torch.manual_seed(1)
    with pytest.raises(DivergedError, match=rf"the loss rose from .* learning rate {lr}$"):
        run(Words(), teacher, lr=lr, tokens=tokens)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round().clamp(-127, 127) * scales, scales


def test_quantised_layers_are_trained_on_their_grid_and_quantised_tables_are_not(
    teacher: Words,
) -> None:
    table, table_scales = quantised(teacher.embedding.weight.detach())
    weight, scales = quantised(nn.Linear(8, 8).weight.detach())
    form = SiteFormat(rows=8, columns=8, bias=True, weight_bits=8)
    student = Words(
        embedding=QuantEmbedding(
            table, table_scales, None, SiteFormat(rows=20, columns=8, bias=False, weight_bits=8)
        ),
        linear=QuantLinear(weight, torch.zeros(8), scales, form),
    )
    linear = cast(QuantLinear, student.linear)
    codes = linear.codes().clone()
    result, _ = run(student, teacher)
    assert result.last_loss < 0.5 * result.first_loss
    assert torch.equal(student.embedding.weight, table)
    assert not torch.equal(linear.codes(), codes)
    assert torch.equal(linear.scales, scales), "the grid it was given is the one that is exported"
    assert int(linear.codes().abs().max()) <= 127


def test_trainable_is_everything_but_the_tables(teacher: Words) -> None:
    assert set(trainable_parameters(teacher)) == {
        "linear.weight",
        "linear.bias",
        "head.weight",
        "head.bias",
    }
    assert not teacher.embedding.weight.requires_grad
    assert math.isfinite(float(teacher.scale))
