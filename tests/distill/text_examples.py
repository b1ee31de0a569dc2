"""A task over the small transformers of the models room: as much as distillation asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from model_examples import EXAMPLES
from replaced_examples import sequences
from torch import nn


class Texts:
    """Padded sequences for a model of `EXAMPLES`, the same batches in the same order each pass."""

    def __init__(self, name: str) -> None:
        self.name, self.all = name, sequences(EXAMPLES[name])

    def batches(self, split: str, batch: int, **_: Any) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.all

    def logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = model(**inputs).logits
        return out if out.ndim == 2 else out[inputs["attention_mask"].bool()]

    def tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        return int(inputs["attention_mask"].sum())
