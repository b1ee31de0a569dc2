"""Batches that the student continues itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_examples import EXAMPLES
from torch import nn
from torch.nn import functional as F
from word_examples import CountingGate

from autocomp.core.candidate import Distillation
from autocomp.distill.on_policy import continued, is_sampled
from autocomp.distill.trainer import Trainer
from autocomp.models.surgery import copy_for_surgery


class Chunks:
    """As much of a language-modelling task as distillation asks for."""

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []

    def batches(self, split: str, batch: int, **_: Any) -> Any:
        rng = torch.Generator().manual_seed(0)
        for _ in range(3):
            ids = torch.randint(0, 50, (batch, 8), generator=rng)
            yield {"input_ids": ids, "labels": ids, "index": torch.arange(batch)}

    def logits(self, model: Any, inputs: Any) -> torch.Tensor:
        self.read.append(inputs["input_ids"])
        out: torch.Tensor = model(input_ids=inputs["input_ids"], use_cache=False).logits
        return out

    def tokens(self, inputs: Any) -> int:
        return int(inputs["input_ids"].numel())

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Counter(nn.Module):
    """Says the token after the one it reads, modulo 50, and is sure of it."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        class Out:
            logits = 100.0 * F.one_hot((input_ids + 1) % 50, 50).float()

        return Out


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, []), (1.0, [0, 1, 2, 3, 4, 5, 6, 7]), (0.5, [1, 3, 5, 7]), (0.25, [3, 7])],
)
def test_the_share_is_spread_evenly(share: float, expected: list[int]) -> None:
    assert [step for step in range(8) if is_sampled(step, share)] == expected


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_the_share_is_met(share: float) -> None:
    assert sum(is_sampled(step, share) for step in range(1000)) == pytest.approx(
        1000 * share, abs=1
    )


def test_the_first_half_is_the_texts_and_the_second_what_the_student_says() -> None:
    ids = torch.tensor([[3, 9, 4, 7, 0, 0, 0, 0, 0], [48, 48, 48, 48, 48, 1, 1, 1, 1]])
    gate, task = CountingGate(), Chunks()
    found = continued(Counter(), task, {"input_ids": ids}, 0, gate)  # type: ignore[arg-type]
    assert set(found) == {"input_ids"}
    assert found["input_ids"].tolist() == [
        [3, 9, 4, 7, 0, 1, 2, 3, 4],
        [48, 48, 48, 48, 48, 49, 0, 1, 2],
    ]
    assert gate.entered == 4, "a measurement may come between two tokens"


def test_tokens_are_drawn_as_the_student_says() -> None:
    class Fixed(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            class Out:
                logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(*input_ids.shape, 3)

            return Out

    ids = torch.zeros(2000, 2, dtype=torch.long)
    task: Any = Chunks()
    drawn = continued(Fixed(), task, {"input_ids": ids}, 1, CountingGate())["input_ids"][:, 1]
    shares = torch.bincount(drawn, minlength=3) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.04, rtol=0)
    same, other = (
        continued(Fixed(), task, {"input_ids": ids}, seed, CountingGate())["input_ids"][:, 1]
        for seed in (1, 2)
    )
    assert torch.equal(same, drawn)
    assert not torch.equal(other, drawn)


def llama() -> tuple[nn.Module, nn.Module]:
    teacher = EXAMPLES["llama"].model()
    student = copy_for_surgery(teacher)
    with torch.no_grad():
        for name in ("0", "1", "2"):
            down = student.get_submodule(f"model.layers.{name}.mlp.down_proj")
            down.weight = nn.Parameter(down.weight * 0.5)
    return teacher, student


@pytest.mark.parametrize("loss", ["logits", "reverse_kl+task", "top_k+hidden"])
def test_a_training_on_its_own_text_approaches_the_teacher(loss: str) -> None:
    teacher, student = llama()
    task: Any = Chunks()
    settings = Distillation(tokens=1600, lr=3e-3, temperature=1.0, loss=loss, on_policy=0.5)
    trainer = Trainer(student, teacher, task, settings, batch=4, seed=0, gate=CountingGate())
    result = trainer.advance(1600)
    assert result.tokens == 1600
    assert result.last_loss < result.first_loss


def test_a_resumed_training_samples_the_same(tmp_path: Path) -> None:
    settings = Distillation(tokens=320, lr=3e-3, temperature=1.0, on_policy=0.5)

    def made() -> tuple[nn.Module, Any, Trainer]:
        teacher, student = llama()
        task: Any = Chunks()
        run = Trainer(student, teacher, task, settings, batch=4, seed=7, gate=CountingGate())
        return student, task, run

    whole, _, run = made()
    run.advance(320)
    _, _, first = made()
    first.advance(160)
    first.save(tmp_path / "half.safetensors")
    again, rest, second = made()
    second.load(tmp_path / "half.safetensors")
    second.advance(320)
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.state_dict().items())
    real = [inputs["input_ids"] for inputs in Chunks().batches("distil", 4)]
    sampled = [ids for ids in rest.read if ids.shape[1] == 8 and not any(map(ids.equal, real))]
    assert len(sampled) == 2 * 3, "three of the last five batches, read by student and teacher"
