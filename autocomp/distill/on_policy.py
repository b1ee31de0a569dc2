"""Batches that the student writes itself, as it will in use (Agarwal et al. 2023, GKD,
arXiv:2306.13649).

A student trained on real text alone never sees what follows its own mistakes. The second half of a
chunk, at most `SAMPLED_TOKENS`, is replaced by what the student says after the first; teacher and
student are then compared on it like on any other batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from autocomp.core.gate import Gate
from autocomp.tasks.protocol import Task

SAMPLED_TOKENS = 32
"""A student may hold mixers and skipped attention, so it is run without a cache: each token costs a
forward pass."""


def is_sampled(step: int, share: float) -> bool:
    """Whether this step's batch is sampled: `share` of all steps, evenly spread."""
    return int((step + 1) * share) > int(step * share)


@torch.no_grad()
def continued(
    student: nn.Module, task: Task, inputs: Mapping[str, torch.Tensor], seed: int, gate: Gate
) -> dict[str, torch.Tensor]:
    """The batch with the end of every chunk sampled from the student, at temperature 1.

    Each token is drawn with the gate held shared.

    Args:
        inputs: `input_ids` int64 `(B, T)`, all real.
        seed: of the draws.
    """
    ids = inputs["input_ids"]
    count = min(SAMPLED_TOKENS, ids.shape[1] // 2)
    draw = torch.Generator().manual_seed(seed)
    ids = ids[:, : ids.shape[1] - count]
    for _ in range(count):
        with gate.working():
            logits = task.logits(student, {"input_ids": ids})[:, -1]
            new = torch.multinomial(logits.float().softmax(-1), 1, generator=draw)
        ids = torch.cat([ids, new], dim=1)
    return {"input_ids": ids}
