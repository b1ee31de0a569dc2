"""The teacher's side of an evaluation: the same figures stored on disk and computed beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autocomp.tasks.language_modeling import LanguageModeling
from autocomp.tasks.protocol import Encoded
from autocomp.trial import runner


def test_large_logits_are_not_stored(tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher, student = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=20,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                initializer_range=0.5,
            )
        ).eval()
        for _ in range(2)
    )
    ids = np.random.default_rng(0).integers(0, 20, size=(5, 6))
    task: Any = LanguageModeling({"search": Encoded({"input_ids": ids}, ids)}, (), None, 2)
    artifact = runner.teacher_side(student, task, "search", tmp_path / "student.npy")
    assert isinstance(artifact, np.ndarray)
    path = tmp_path / "teacher.npy"
    stored = runner.teacher_side(teacher, task, "search", path)
    assert path.exists()
    path.unlink()
    monkeypatch.setattr(runner, "STORED_LOGITS_BYTES", 5 * 6 * 20 * 4 - 1)
    beside = runner.teacher_side(teacher, task, "search", path)
    assert callable(beside)
    assert not path.exists()

    def run(inputs: dict[str, Any]) -> Any:
        feeds = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return task.logits(student, feeds).detach().numpy()

    one = task.evaluate(run, "search", teacher=stored)
    other = task.evaluate(run, "search", teacher=beside)
    assert one.teacher_kl == pytest.approx(other.teacher_kl, rel=1e-5)
    assert one.teacher_kl > 0.01
