"""The screener: candidates in any order, alike or not, get the divergence each gets alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_examples import EXAMPLES

from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.gate import Gate
from autocomp.library.store import Library
from autocomp.trial import screener
from autocomp.trial.screener import Screener

SKIP = Option((Step.of("skip"),))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Screener, Any]:
    example = EXAMPLES["bert"]
    model, units = example.model(), example.units()
    examples = example.inputs(8)

    class Task:
        name, num_labels = "text-classification", 3
        splits = {"distil": [None] * 8}  # noqa: RUF012

        def batches(self, split: str, batch: int, **how: Any) -> Any:
            count = how.get("limit") or 8
            for start in range(0, count, batch):
                stop = min(start + batch, count)
                place = {"index": torch.arange(start, stop)} if how.get("index") else {}
                yield {name: tensor[start:stop] for name, tensor in examples.items()} | place

        def logits(self, model: Any, inputs: Any) -> torch.Tensor:
            return model(**inputs).logits

    monkeypatch.setattr(screener, "make_task", lambda *_: Task())
    monkeypatch.setattr(screener, "load_model", lambda *_: model)
    monkeypatch.setattr(screener, "BATCH", 3)
    context = SimpleNamespace(
        spec=SimpleNamespace(
            search=SimpleNamespace(screen_examples=7),
            model=SimpleNamespace(trust_remote_code=False),
        ),
        model_path=tmp_path,
        teacher_path=tmp_path,
        library_path=Library(tmp_path / "library").root,
        items={},
        units=units,
        gate=Gate(tmp_path / "gate"),
    )
    return Screener(context), units  # type: ignore[arg-type]


def test_nothing_is_a_batch_too(bench: tuple[Screener, Any]) -> None:
    assert bench[0].evaluate([]) == []


def test_candidates_keep_their_places_and_values(bench: tuple[Screener, Any]) -> None:
    found, units = bench
    names = ["layers.2.ffn", "layers.0.attention", "layers.2.attention", "layers.1.ffn"]
    candidates = [
        Candidate.of({unit.name: SKIP if unit.name == name else Option() for unit in units})
        for name in [*names, "none"]
    ]
    alone = [found.divergence(candidate) for candidate in candidates]
    assert len(set(alone)) == 5
    assert alone[-1] == pytest.approx(0.0, abs=1e-7)
    for _ in range(2):  # the second time with what the first kept
        together = found.evaluate([candidate.to_json() for candidate in candidates])
        assert together == alone
    assert [len(reference) for reference in found.examples.reference] == [3, 3, 1]
