"""Prefixes: what is left out changes nothing, and what could be left out is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from model_examples import EXAMPLES, Example
from torch import nn

from autocomp.core.candidate import Candidate, Option, Step
from autocomp.models.surgery import blocks, copy_for_surgery, skip
from autocomp.models.tokens import install_tokens
from autocomp.operators import token_reduction
from autocomp.trial.prefixes import Prefixes

SKIP = Option((Step.of("skip"),))


class Bench:
    """A model, and candidates that skip some of its sublayers."""

    def __init__(self, example: Example, capacity_bytes: int = 2**20) -> None:
        self.teacher = example.model()
        self.units = example.units()
        self.batches = [example.inputs(3), example.inputs(2)]
        self.prefixes = Prefixes(self.units, self.batches, capacity_bytes)
        self.ran: list[int] = []

    def candidate(self, *skipped: str) -> Candidate:
        return Candidate.of(
            {unit.name: SKIP if unit.name in skipped else Option() for unit in self.units}
        )

    def model(self, candidate: Candidate) -> nn.Module:
        model = copy_for_surgery(self.teacher)
        reductions = {}
        for unit in self.units:
            reduction = token_reduction(unit, candidate[unit.name])
            if reduction is not None:
                reductions[unit.name] = reduction
            elif not candidate[unit.name].dense:
                skip(model, unit)
        install_tokens(model, self.units, reductions)
        return model

    @torch.no_grad()
    def expected(self, candidate: Candidate) -> list[torch.Tensor]:
        model = self.model(candidate)
        return [model(**batch).logits for batch in self.batches]

    @torch.no_grad()
    def outputs(self, candidate: Candidate, keep: int = 0) -> list[torch.Tensor]:
        """By way of the prefixes; `ran` says which blocks ran, for each batch."""
        model = self.model(candidate)
        self.ran = []
        for index, block in enumerate(blocks(model)):
            self._count(block, index)

        def forward(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            logits: torch.Tensor = model(**batch).logits
            return logits

        return list(self.prefixes.outputs(model, candidate, forward, keep))

    def _count(self, block: nn.Module, index: int) -> None:
        """Through the class, so that the `forward` of the instance stays free."""
        kind = type(block)

        def forward(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.ran.append(index)
            return kind.forward(this, *args, **kwargs)

        block.__class__ = type(kind.__name__, (kind,), {"forward": forward})


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_known_prefixes_are_left_out_and_change_nothing(name: str) -> None:
    bench = Bench(EXAMPLES[name])
    first, second = bench.candidate("layers.2.ffn"), bench.candidate("layers.2.attention")
    assert bench.prefixes.common(first, second) == 2
    for found, expected in zip(bench.outputs(first, keep=2), bench.expected(first), strict=True):
        assert torch.equal(found, expected)
    assert bench.ran == [0, 1, 2, 0, 1, 2]
    for found, expected in zip(bench.outputs(second), bench.expected(second), strict=True):
        assert torch.equal(found, expected)
    assert bench.ran == [2, 2]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_sizes_of_merged_tokens_are_known_behind_a_prefix(name: str) -> None:
    """The second candidate runs its last block alone, whose merge and mean need the sizes."""
    bench = Bench(EXAMPLES[name])
    merge = Option((Step.of("tome", ratio=0.25),))

    def merging(*skipped: str) -> Candidate:
        options = dict(bench.candidate(*skipped).options)
        return Candidate.of({**options, "layers.0.attention": merge, "layers.2.attention": merge})

    first, second, stranger = merging("layers.2.ffn"), merging(), merging("layers.1.ffn")
    assert bench.prefixes.common(first, second) == 2
    bench.outputs(first, keep=2)
    bench.outputs(stranger)
    for found, expected in zip(bench.outputs(second), bench.expected(second), strict=True):
        assert torch.equal(found, expected)
    assert bench.ran == [2, 2]


def test_another_prefix_is_not_used() -> None:
    bench = Bench(EXAMPLES["bert"])
    bench.outputs(bench.candidate("layers.2.ffn"), keep=2)
    other = bench.candidate("layers.0.ffn")
    assert bench.prefixes.common(other, bench.candidate()) == 0
    for found, expected in zip(bench.outputs(other), bench.expected(other), strict=True):
        assert torch.equal(found, expected)
    assert bench.ran == [0, 1, 2, 0, 1, 2]


def test_embeddings_belong_to_every_prefix() -> None:
    bench = Bench(EXAMPLES["bert"])
    dense = bench.candidate()
    options = dict(dense.options)
    options["embeddings"] = Option((Step.of("rtn", weights=8),))
    assert bench.prefixes.common(dense, Candidate.of(options)) == 0


def test_a_longer_prefix_is_kept_on_top_of_a_shorter_one() -> None:
    bench = Bench(EXAMPLES["bert"])
    bench.outputs(bench.candidate(), keep=1)
    bench.outputs(bench.candidate("layers.2.ffn"), keep=2)
    assert bench.ran == [1, 2, 1, 2]
    last = bench.candidate("layers.2.attention")
    for found, expected in zip(bench.outputs(last), bench.expected(last), strict=True):
        assert torch.equal(found, expected)
    assert bench.ran == [2, 2]


def test_what_was_used_longest_ago_goes_when_it_is_too_much() -> None:
    size = 3 * 7 * 24 * 4 + 2 * 7 * 24 * 4  # hidden states of both batches behind one block
    bench = Bench(EXAMPLES["bert"], capacity_bytes=2 * size)
    bench.outputs(bench.candidate(), keep=1)
    bench.outputs(bench.candidate("layers.0.ffn"), keep=1)
    bench.outputs(bench.candidate("layers.1.ffn"))  # uses the first
    bench.outputs(bench.candidate("layers.0.attention"), keep=1)  # the second goes
    bench.outputs(bench.candidate("layers.2.ffn"))
    assert bench.ran == [1, 2, 1, 2]
    bench.outputs(bench.candidate("layers.0.ffn"))
    assert bench.ran == [0, 1, 2, 0, 1, 2]
