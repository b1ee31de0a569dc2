"""A model of two layers and a task for it: as much of each as distillation asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from autocomp.core.gate import Gate

EXAMPLES, TOKENS, CLASSES = 48, 5, 3


class Words(nn.Module):
    """Mean of embeddings, then a linear layer and a head."""

    def __init__(self, embedding: nn.Module | None = None, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = embedding or nn.Embedding(20, 8)
        self.linear = linear or nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.linear(self.embedding(ids).mean(1))) * self.scale
        out: torch.Tensor = self.head(self.dropout(hidden))
        return out


class Sentences:
    """The part of a task that distillation needs."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, 20, (EXAMPLES, TOKENS), generator=draw)
        self.seeds: list[int | None] = []

    def batches(
        self, split: str, batch: int, *, seed: int | None = None, index: bool = False
    ) -> Iterator[dict[str, torch.Tensor]]:
        assert split == "transfer"
        self.seeds.append(seed)
        order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(seed or 0))
        for rows in order.split(batch):
            yield {"ids": self.ids[rows], "index": rows}

    def logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = model(inputs["ids"])
        return out

    def tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        return inputs["ids"].numel()


class CountingGate(Gate):
    """A gate in memory."""

    def __init__(self) -> None:
        self.entered = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        self.entered += 1
        yield
