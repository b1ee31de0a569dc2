"""What is kept of a model's layers, and what a training with it does, on models of every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_examples import EXAMPLES
from reduced import keep_heads
from replaced_examples import Distances, calm
from text_examples import Texts
from torch import nn
from word_examples import CountingGate

from autocomp.core.candidate import Distillation
from autocomp.core.tokens import TokenReduction
from autocomp.distill.known import Known
from autocomp.distill.losses import LOSSES
from autocomp.distill.losses.protocol import Batch
from autocomp.distill.objective import Objective
from autocomp.distill.outputs import observe
from autocomp.distill.trainer import distil
from autocomp.models.seat import install_mixer, mixer_shape
from autocomp.models.surgery import copy_for_surgery, skip
from autocomp.models.tokens import install_tokens

ALL = ("logits", "hidden", "attention")


class Examples(Texts):
    """Texts or images."""

    def logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        known = {k: v for k, v in inputs.items() if k not in ("index", "labels")}
        out: torch.Tensor = model(**known).logits
        return out


def asked(name: str) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    example = EXAMPLES[name]
    return calm(example.model()), Examples(name), example.inputs()


def unit_of(name: str, layer: int, kind: str = "attention") -> Any:
    return next(u for u in EXAMPLES[name].units() if u.name == f"layers.{layer}.{kind}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_hidden_states_are_those_that_transformers_hands_out(name: str) -> None:
    model, task, inputs = asked(name)
    with torch.no_grad():
        kept = observe(model, task, inputs, ALL)
        assert not any(module._forward_hooks for module in model.modules()), "they are taken off"
        known = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(kept.logits, known.logits)
    assert list(kept.hidden) == list(kept.attention) == [0, 1, 2]
    for layer in (0, 1):  # behind the last block some models put a norm
        torch.testing.assert_close(kept.hidden[layer], known.hidden_states[layer + 1])
    assert {t.shape for t in kept.attention.values()} == {t.shape for t in kept.hidden.values()}
    plain = observe(model, task, inputs, ("logits",))
    assert (plain.hidden, plain.attention) == ({}, {})


@pytest.mark.parametrize("name", EXAMPLES)
def test_skipped_attention_is_missing_and_a_skipped_ffn_is_not(name: str) -> None:
    model, task, inputs = asked(name)
    student = copy_for_surgery(model)
    skip(student, unit_of(name, 1))
    skip(student, unit_of(name, 2, "ffn"))
    kept = observe(student, task, inputs, ALL)
    assert list(kept.attention) == [0, 2]
    assert list(kept.hidden) == [0, 1, 2]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_fewer_heads_and_mixers_write_as_wide_as_attention(name: str) -> None:
    model, task, inputs = asked(name)
    student = copy_for_surgery(model)
    heads = unit_of(name, 0)
    keep_heads(student, heads, range(heads.heads // heads.kv_heads))
    install_mixer(student, unit_of(name, 1), Distances(mixer_shape(unit_of(name, 1))))
    kept, known = (observe(one, task, inputs, ALL) for one in (student, model))
    for layer in (0, 1, 2):
        assert kept.attention[layer].shape == known.attention[layer].shape
    batch = Batch(inputs, task, Distillation(tokens=1))
    assert len(batch.pairs(kept.attention, known.attention)) == 3


def test_layers_behind_merged_tokens_have_no_counterpart() -> None:
    model, task, inputs = asked("vit")
    student = copy_for_surgery(model)
    install_tokens(
        student, EXAMPLES["vit"].units(), {"layers.1.attention": TokenReduction("tome", 0.5, 1)}
    )
    kept, known = (observe(one, task, inputs, ALL) for one in (student, model))
    batch = Batch(inputs, task, Distillation(tokens=1))
    assert len(batch.pairs(kept.hidden, known.hidden)) == 1
    assert len(batch.pairs(kept.attention, known.attention)) == 2, "before its tokens are merged"


@pytest.mark.parametrize("loss", ["hidden", "relations"])
def test_a_term_of_the_sum_is_learnt(loss: str) -> None:
    """It ends lower than it began, and lower than where the outputs alone are trained."""
    teacher, task, inputs = asked("bert")
    ended = {}
    for total in ("logits", f"logits+{loss}"):
        student = copy_for_surgery(teacher)
        torch.manual_seed(0)
        for layer in range(3):
            dense = student.get_submodule(f"bert.encoder.layer.{layer}.attention.output.dense")
            noise = 0.2 * torch.randn(24, 24)
            dense.weight = nn.Parameter(dense.weight.detach() + noise)
        settings = Distillation(tokens=3000, lr=2e-3, temperature=1.0, loss=total)
        with torch.no_grad():
            known, before = (observe(one, task, inputs, ALL) for one in (teacher, student))
        distil(student, teacher, task, settings, batch=24, seed=0, gate=CountingGate())
        with torch.no_grad():
            after = observe(student, task, inputs, ALL)
        began, ended[total] = (
            float(LOSSES.get(loss)(outputs, known, Batch(inputs, task, settings)))
            for outputs in (before, after)
        )
    assert ended[total] < 0.7 * began
    assert ended[total] < 0.7 * ended["logits"]


def test_the_objective_is_the_weighted_sum_and_known_logits_stand_in() -> None:
    teacher, task, inputs = asked("bert")
    student = calm(EXAMPLES["bert"].model())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    rows = torch.tensor([4, 0, 2])
    inputs = {**inputs, "index": rows, "labels": torch.tensor([0, 1, 2])}
    task.loss = nn.functional.cross_entropy
    settings = Distillation(tokens=1, loss="reverse_kl+hidden+relations+task", weight=0.25)
    with torch.no_grad():
        found, classes = Objective(teacher, task, settings, None)(student, inputs)
        own, other = (observe(one, task, inputs, ALL) for one in (student, teacher))
        batch = Batch(inputs, task, settings)
        parts = [float(LOSSES.get(name)(own, other, batch)) for name in settings.losses]
    assert min(parts) > 0
    assert float(found) == pytest.approx(parts[0] + 0.25 * sum(parts[1:]), rel=1e-6)
    assert classes == 3
    known = torch.zeros(5, 3)
    known[rows] = other.logits + 1.0  # the same distribution, other logits
    with torch.no_grad():
        again, _ = Objective(teacher, task, settings, Known(known.numpy()))(student, inputs)
    assert float(again) == pytest.approx(float(found), rel=1e-5)
    known[rows] = -other.logits
    with torch.no_grad():
        other_target, _ = Objective(teacher, task, settings, Known(known.numpy()))(student, inputs)
    assert float(other_target) != pytest.approx(float(found), rel=1e-2)
