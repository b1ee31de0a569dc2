"""How the learning rate goes: warm-up, then as the settings say, whatever the losses."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from word_examples import CountingGate, Sentences, Words

from autocomp.core.candidate import Distillation
from autocomp.distill.schedule import rate
from autocomp.distill.trainer import Trainer
from autocomp.tasks.protocol import Task


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("cosine", {0.25: 0.5 + math.sqrt(0.125), 0.5: 0.5, 0.75: 0.5 - math.sqrt(0.125), 1.0: 0}),
        ("linear", {0.25: 0.75, 0.5: 0.5, 0.75: 0.25, 1.0: 0.0}),
        ("constant", {0.25: 1.0, 0.5: 1.0, 0.75: 1.0, 1.0: 1.0}),
    ],
)
def test_it_warms_up_and_falls(schedule: str, at: dict[float, float]) -> None:
    for done, expected in at.items():
        assert rate(schedule, done) == pytest.approx(expected, abs=1e-12)
    assert rate(schedule, 0.0) == pytest.approx(0.01)
    warming = [rate(schedule, done / 100) for done in range(10)]
    assert warming == sorted(warming)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_training_follows_it_by_tokens(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    settings = Distillation(tokens=400, lr=1e-2, temperature=1.0, schedule=schedule)
    task = cast(Task, Sentences())
    run = Trainer(Words(), Words(), task, settings, batch=8, seed=0, gate=CountingGate())
    run.advance(120)
    run.advance(400)
    assert used == [1e-2 * rate(schedule, 40 * done / 400) for done in range(10)]
