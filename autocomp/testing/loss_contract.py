"""The contract of a distillation loss, as tests. Needs pytest and torch.

    from autocomp.testing.loss_contract import LossContract

    class TestMyLoss(LossContract):
        @pytest.fixture
        def loss(self):
            return MY_LOSS

It is asked about a classifier of texts that vary in length and about a language model, both small
and of random numbers in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autocomp.core.candidate import Distillation
from autocomp.distill.losses.protocol import Batch, Loss, Outputs
from autocomp.tasks.protocol import Task

BATCH, TOKENS, WIDTH, CLASSES, LAYERS = 3, 5, 32, 9, 2
SETTINGS = Distillation(tokens=1000, temperature=2.0, top_k=4)
READINGS = ("logits", "hidden", "attention", "labels")


class _Labels:
    """As much of a task as a loss asks for."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@dataclass(frozen=True)
class Case:
    """Student and teacher, each random, and the batch they were asked about."""

    teacher: Outputs
    student: Outputs
    batch: Batch

    def value(self, loss: Loss) -> Tensor:
        """The loss."""
        return loss(self.student, self.teacher, self.batch)


def cases() -> dict[str, Case]:
    """The classifier and the language model."""
    rng = torch.Generator().manual_seed(0)

    def outputs(*leading: int) -> Outputs:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        layers = range(LAYERS)
        return Outputs(
            2 * random(*leading, CLASSES),
            {layer: random(BATCH, TOKENS, WIDTH) for layer in layers},
            {layer: random(BATCH, TOKENS, WIDTH) for layer in layers},
        )

    found = {}
    for name, leading in (("classifier", (BATCH,)), ("language model", (BATCH, TOKENS))):
        labels = torch.randint(0, CLASSES, leading, generator=rng)
        inputs = {"labels": labels, "index": torch.arange(BATCH)}
        if name == "classifier":
            inputs["attention_mask"] = torch.tensor(
                [[1] * TOKENS, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
            )
        batch = Batch(inputs, cast(Task, _Labels()), SETTINGS)
        found[name] = Case(outputs(*leading), outputs(*leading), batch)
    return found


def leaves(outputs: Outputs) -> list[Tensor]:
    """Its tensors, in a fixed order."""
    return [outputs.logits, *outputs.hidden.values(), *outputs.attention.values()]


def rebuilt(tensors: tuple[Tensor, ...]) -> Outputs:
    """The outputs of `leaves`."""
    return Outputs(
        tensors[0],
        dict(enumerate(tensors[1 : 1 + LAYERS])),
        dict(enumerate(tensors[1 + LAYERS :])),
    )


class LossContract:
    """What holds for every loss."""

    @pytest.fixture
    def loss(self) -> Loss:
        """The loss under test."""
        raise NotImplementedError("give the fixture `loss`")

    @pytest.fixture(params=["classifier", "language model"])
    def case(self, request: pytest.FixtureRequest) -> Case:
        """What it is asked about."""
        return cases()[request.param]

    def test_it_says_what_it_is(self, loss: Loss) -> None:
        assert loss.name
        assert "+" not in loss.name, "sums are written with it"
        assert loss.summary.endswith(".")
        assert loss.paper
        assert loss.reads
        assert set(loss.reads) <= set(READINGS)
        assert set(loss.uses) <= set(vars(SETTINGS))
        assert loss.divergence == ("labels" not in loss.reads)

    def test_it_is_one_finite_number(self, loss: Loss, case: Case) -> None:
        value = case.value(loss)
        assert value.shape == ()
        assert torch.isfinite(value)
        assert torch.equal(value, case.value(loss)), "it is not deterministic"

    def test_it_reads_what_it_says(self, loss: Loss, case: Case) -> None:
        nothing = torch.full((), torch.nan, dtype=torch.float64)
        unread: dict[str, Any] = {}
        if "logits" not in loss.reads:  # their shape and type may be asked for
            unread["logits"] = torch.full_like(case.student.logits, torch.nan)
        for name in ("hidden", "attention"):
            if name not in loss.reads:
                unread[name] = dict.fromkeys(range(LAYERS), nothing)
        blind = replace(
            case, student=replace(case.student, **unread), teacher=replace(case.teacher, **unread)
        )
        assert torch.equal(blind.value(loss), case.value(loss))

    def test_it_uses_what_it_says(self, loss: Loss, case: Case) -> None:
        other: dict[str, Any] = {
            "temperature": 4.0,
            "layers": "last",
            "top_k": 2,
            "weight": 3.0,
            "lr": 1.0,
        }
        for name, value in other.items():
            settings = replace(SETTINGS, **{name: value})
            changed = replace(case, batch=replace(case.batch, settings=settings)).value(loss)
            assert torch.equal(changed, case.value(loss)) != (name in loss.uses), name

    def test_a_divergence_is_positive_between_two_and_zero_at_the_teacher(
        self, loss: Loss, case: Case
    ) -> None:
        if not loss.divergence:
            return
        assert float(case.value(loss)) > 1e-3
        tensors = [tensor.clone().requires_grad_() for tensor in leaves(case.teacher)]
        value = loss(rebuilt(tuple(tensors)), case.teacher, case.batch)
        assert abs(float(value.detach())) < 1e-12
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
        assert any(gradient is not None for gradient in gradients)
        for gradient in gradients:
            assert gradient is None or float(gradient.abs().max()) < 1e-12

    def test_the_gradient_is_that_of_finite_differences(self, loss: Loss, case: Case) -> None:
        tensors = tuple(tensor.clone().requires_grad_() for tensor in leaves(case.student))

        def value(*given: Tensor) -> Tensor:
            return loss(rebuilt(given), case.teacher, case.batch)

        assert torch.autograd.gradcheck(value, tensors, eps=1e-6, atol=1e-7, rtol=1e-5)

    def test_padding_changes_nothing(self, loss: Loss, case: Case) -> None:
        real = case.batch.real
        if real is None:
            return

        def garbled(outputs: Outputs) -> Outputs:
            logits, *states = leaves(outputs)
            wild = [torch.where(real[..., None], state, 1e3 - state) for state in states]
            return rebuilt((logits, *wild))

        other = replace(case, student=garbled(case.student), teacher=garbled(case.teacher))
        torch.testing.assert_close(other.value(loss), case.value(loss), rtol=1e-12, atol=0)

    def test_extremes_stay_finite(self, loss: Loss, case: Case) -> None:
        for scale in (0.0, 1e3):
            tensors = [(tensor * scale).float().requires_grad_() for tensor in leaves(case.student)]
            teacher = rebuilt(tuple((tensor * scale).float() for tensor in leaves(case.teacher)))
            for target in (teacher, rebuilt(tuple(t.float() for t in leaves(case.teacher)))):
                value = loss(rebuilt(tuple(tensors)), target, case.batch)
                assert torch.isfinite(value), scale
                for gradient in torch.autograd.grad(value, tensors, allow_unused=True):
                    assert gradient is None or torch.isfinite(gradient).all(), scale
