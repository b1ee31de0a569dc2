"""What stands in attention's place is trained on: recorded calls, in chunks, with their targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocomp.calibrate.record import Call
from autocomp.operators.replace.sublayer import Sublayer

SEED = 20
CHUNK_TOKENS = 4096
"""Tokens, padding included, that run through the sublayer at a time."""


@dataclass(frozen=True)
class Example:
    """Sequences with the target `(B, T, C)` at them; `real` bool `(B, T)`."""

    call: Call
    target: Tensor
    real: Tensor
    tokens: int


@torch.no_grad()
def examples_of(
    teacher: Sublayer, calls: Sequence[Call], held_out: int
) -> tuple[list[Example], list[Example]]:
    """Chunks to train on and held-out ones, with the teacher's output at them.

    Args:
        held_out: one sequence in this many is not trained on.
    """
    train: list[Example] = []
    held: list[Example] = []
    sequences = sum(len(call.hidden) for call in calls)
    every = min(held_out, sequences)  # the last of so many; none where there is but one
    number = 0
    for call in calls:
        batch, tokens = call.hidden.shape[:2]
        numbers = torch.arange(number, number + batch)
        number += batch
        out = (numbers % every == every - 1) if every > 1 else torch.zeros(batch, dtype=torch.bool)
        height = max(1, CHUNK_TOKENS // tokens)
        for rows, part in ((~out, train), (out, held)):
            for index in torch.split(rows.nonzero().flatten(), height):
                if len(index):
                    part.append(_example(teacher, call.rows(index)))
    return train, held


def _example(teacher: Sublayer, call: Call) -> Example:
    target = teacher.run(call)
    batch, tokens = call.hidden.shape[:2]
    real = torch.ones(batch, tokens, dtype=torch.bool) if call.real is None else call.real
    if call.hidden.dtype == torch.float16 and float(target[real].abs().max()) < 6e4:
        target = target.half()
    return Example(call, target, real, int(real.sum()))


def in_steps(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """For ever: the examples of a step, in an order drawn anew every time all were seen."""
    generator = torch.Generator().manual_seed(SEED)
    drawn: list[Example] = []
    while True:
        for index in torch.randperm(len(examples), generator=generator).tolist():
            drawn.append(examples[index])
            if sum(example.tokens for example in drawn) >= tokens:
                yield drawn
                drawn = []
        if drawn and sum(example.tokens for example in examples) <= tokens:
            yield drawn
            drawn = []
