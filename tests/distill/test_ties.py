"""Distilling a student whose table and head are one: they stay one, and the teacher stays as is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autocomp.core.candidate import Distillation
from autocomp.core.gate import Gate
from autocomp.distill.trainer import distil
from autocomp.models.surgery import copy_for_surgery


class _Chunks:
    """As much of a language-modelling task as distillation asks for."""

    def batches(self, split: str, batch: int, **_: Any) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            yield {"input_ids": torch.randint(0, 20, (batch, 6), generator=generator)}

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["input_ids"], use_cache=False).logits
        return logits

    def tokens(self, batch: dict[str, torch.Tensor]) -> int:
        return batch["input_ids"].numel()


def test_a_tied_student_stays_tied_and_the_teacher_stays(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    teacher = LlamaForCausalLM(config).eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = copy_for_surgery(teacher)
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(16, 24))
    settings = Distillation(tokens=240, lr=1e-2, temperature=1.0)
    task: Any = _Chunks()
    result = distil(student, teacher, task, settings, batch=2, seed=0, gate=Gate(tmp_path / "gate"))
    assert result.tokens == 240
    assert result.last_loss < result.first_loss
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert torch.equal(student.lm_head.weight, before["lm_head.weight"])
    assert student.model.layers[0].mlp.down_proj.weight.abs().max() > 0
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
