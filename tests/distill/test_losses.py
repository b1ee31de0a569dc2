"""Every loss keeps the contract, and equals what its paper says, worked out in another way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from autocomp.core.candidate import Distillation
from autocomp.core.errors import UserError
from autocomp.distill.losses import LOSSES, leads
from autocomp.distill.losses.protocol import Batch, Loss, Outputs
from autocomp.distill.losses.relations import RELATION_WIDTH
from autocomp.testing.loss_contract import SETTINGS, Case, LossContract, cases


class TestEveryLoss(LossContract):
    @pytest.fixture(params=LOSSES.names())
    def loss(self, request: pytest.FixtureRequest) -> Loss:
        return LOSSES.get(request.param)


@pytest.fixture(params=["classifier", "language model"])
def case(request: pytest.FixtureRequest) -> Case:
    return cases()[request.param]


def value(name: str, case: Case, **settings: Any) -> float:
    batch = replace(case.batch, settings=replace(SETTINGS, **settings))
    return float(LOSSES.get(name)(case.student, case.teacher, batch))


def softmax(logits: torch.Tensor, temperature: float) -> np.ndarray[Any, Any]:
    scaled = logits.numpy().astype(np.float64).reshape(-1, logits.shape[-1]) / temperature
    exponents = np.exp(scaled - scaled.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_are_torchs_kl_div_times_the_temperature_squared(
    case: Case, temperature: float
) -> None:
    student = (case.student.logits / temperature).log_softmax(-1).flatten(0, -2)
    teacher = (case.teacher.logits / temperature).log_softmax(-1).flatten(0, -2)
    expected = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    found = value("logits", case, temperature=temperature)
    assert found == pytest.approx(temperature**2 * float(expected), rel=1e-12)
    reverse = F.kl_div(teacher, student, log_target=True, reduction="batchmean")
    found = value("reverse_kl", case, temperature=temperature)
    assert found == pytest.approx(temperature**2 * float(reverse), rel=1e-12)


def test_reverse_kl_is_the_sum_over_what_the_student_says(case: Case) -> None:
    p, q = softmax(case.teacher.logits, 2.0), softmax(case.student.logits, 2.0)
    expected = 4.0 * (q * (np.log(q) - np.log(p))).sum(1).mean()
    assert value("reverse_kl", case, temperature=2.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 7, 8, 9, 50])
def test_top_k_is_the_kl_of_k_classes_and_the_rest_as_one(case: Case, k: int) -> None:
    p, q = softmax(case.teacher.logits, 2.0), softmax(case.student.logits, 2.0)
    total = 0.0
    for target, guess in zip(p, q, strict=True):
        likely = np.argsort(-target)[:k]
        rest = np.setdiff1d(np.arange(len(target)), likely)
        total += sum(target[i] * np.log(target[i] / guess[i]) for i in likely)
        if len(rest):
            left, its = target[rest].sum(), guess[rest].sum()
            total += left * np.log(left / its)
    expected = 4.0 * total / len(p)
    assert value("top_k", case, temperature=2.0, top_k=k) == pytest.approx(expected, rel=1e-10)
    whole = value("logits", case, temperature=2.0)
    assert expected == pytest.approx(whole, rel=1e-10) if k >= 8 else expected < whole


def test_top_k_is_right_where_the_rest_is_as_good_as_nothing() -> None:
    """1 − p would be zero in float32 from 25 nats on, and its logarithm infinite."""
    logits = torch.tensor([[40.0, 0.0, 1.0]], dtype=torch.float32)
    one = cases()["classifier"]
    batch = replace(one.batch, settings=Distillation(tokens=1, temperature=1.0, top_k=1))
    teacher = Outputs(torch.zeros(1, 3), {}, {})
    found = float(LOSSES.get("top_k")(Outputs(logits, {}, {}), teacher, batch))
    q = softmax(logits, 1.0)[0]
    expected = np.log(1 / 3 / q[0]) / 3 + 2 / 3 * np.log(2 / 3 / (q[1] + q[2]))
    assert found == pytest.approx(expected, rel=1e-5)


def real_tokens(case: Case) -> list[tuple[int, int]]:
    real = case.batch.real
    shape = case.student.hidden[0].shape[:2]
    return [
        (row, token)
        for row in range(shape[0])
        for token in range(shape[1])
        if real is None or real[row, token]
    ]


@pytest.mark.parametrize(("layers", "chosen"), [("each", (0, 1)), ("last", (1,))])
def test_hidden_is_the_relative_error_of_every_real_token(
    case: Case, layers: str, chosen: tuple[int, ...]
) -> None:
    errors = []
    for layer in chosen:
        own, other = case.student.hidden[layer].numpy(), case.teacher.hidden[layer].numpy()
        errors.append(
            np.mean(
                [
                    ((own[at] - other[at]) ** 2).sum() / (other[at] ** 2).sum()
                    for at in real_tokens(case)
                ]
            )
        )
    assert value("hidden", case, layers=layers) == pytest.approx(np.mean(errors), rel=1e-12)


@pytest.mark.parametrize(("layers", "chosen"), [("each", (0, 1)), ("last", (1,))])
def test_relations_are_those_of_the_paper_by_a_plain_loop(
    case: Case, layers: str, chosen: tuple[int, ...]
) -> None:
    """MiniLMv2, equations 5 to 7, with what attention writes for the queries, keys and values."""
    rows: dict[int, list[int]] = {}
    for row, token in real_tokens(case):
        rows.setdefault(row, []).append(token)

    def relation(states: np.ndarray[Any, Any], head: int, tokens: list[int]) -> Any:
        part = states[:, head * RELATION_WIDTH : (head + 1) * RELATION_WIDTH]
        table = np.zeros((len(tokens), len(tokens)))
        for i, one in enumerate(tokens):
            for j, other in enumerate(tokens):
                table[i, j] = np.exp(part[one] @ part[other] / np.sqrt(RELATION_WIDTH))
        return table / table.sum(1, keepdims=True)

    means = []
    for layer in chosen:
        own, other = case.student.attention[layer].numpy(), case.teacher.attention[layer].numpy()
        total = []
        for row, tokens in rows.items():
            for head in range(own.shape[-1] // RELATION_WIDTH):
                p, q = relation(other[row], head, tokens), relation(own[row], head, tokens)
                total.append((p * np.log(p / q)).sum(1))
        means.append(np.concatenate(total).mean())
    assert value("relations", case, layers=layers) == pytest.approx(np.mean(means), rel=1e-10)


def test_task_is_the_cross_entropy_of_the_labels(case: Case) -> None:
    labels = case.batch.inputs["labels"].flatten().tolist()
    probabilities = softmax(case.student.logits, 1.0)
    expected = -np.mean(
        [np.log(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    )
    assert value("task", case) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["hidden", "relations"])
def test_layers_that_the_student_lacks_or_shortened_are_left_out(name: str) -> None:
    case = cases()["language model"]
    reading = "hidden" if name == "hidden" else "attention"
    states = getattr(case.student, reading)
    alone = replace(case, student=replace(case.student, **{reading: {0: states[0]}}))
    shorter = {0: states[0], 1: states[1][:, :3]}
    merged = replace(case, student=replace(case.student, **{reading: shorter}))
    expected = value(name, alone)
    assert value(name, merged) == expected != value(name, case)
    assert value(name, merged, layers="last") == expected, "the last that can be compared"
    nothing = replace(case, student=replace(case.student, **{reading: {}}))
    assert value(name, nothing) == 0.0


def test_what_may_begin_a_sum() -> None:
    assert [name for name in LOSSES if leads(name)] == ["logits", "reverse_kl", "top_k"]
    with pytest.raises(UserError, match=r"unknown loss 'kl'.*Available: hidden, logits"):
        LOSSES.get("kl")


def test_real_tokens_are_those_of_the_mask() -> None:
    settings = Distillation(tokens=1)
    task: Any = None
    mask = torch.tensor([[1, 1, 0]])
    real = Batch({"attention_mask": mask}, task, settings).real
    assert real is not None
    assert real.tolist() == [[True, True, False]]
    assert Batch({"input_ids": mask}, task, settings).real is None
