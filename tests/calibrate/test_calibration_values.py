"""Extremes and samples of inputs: exact, streamed, independent of batching."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_examples import EXAMPLES

from autocomp.calibrate.stats import load_stats
from autocomp.calibrate.stream import calibrate
from autocomp.calibrate.values import SAMPLE_VALUES, Values, sample_rows


def gathered(rows: torch.Tensor, sizes: list[int]) -> Values:
    values = Values(rows.shape[1])
    for part in rows.split(sizes):
        values.add(part)
    return values


@pytest.mark.parametrize("sizes", [[2000], [1] * 100 + [1900], [700, 0, 1300], [511, 1, 1488]])
def test_what_is_kept_does_not_depend_on_batches(sizes: list[int]) -> None:
    rows = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = gathered(rows, [2000]), gathered(rows, sizes)
    assert torch.equal(parts.low, rows.amin(0))
    assert torch.equal(parts.high, rows.amax(0))
    assert len(parts.sample) == 512
    assert torch.equal(parts.sample, whole.sample)
    numbers = [int((rows == row).all(1).nonzero()) for row in parts.sample]
    assert numbers == sorted(set(numbers))  # rows of the input, each once, in order
    # Spread over the whole input: each tenth holds about a tenth of the sample.
    counts = torch.histc(torch.tensor(numbers, dtype=torch.float32), 10, 0, 2000)
    assert counts.min() > 30


def test_few_rows_are_all_kept() -> None:
    rows = torch.arange(12.0).view(4, 3)
    assert torch.equal(gathered(rows, [1, 3]).sample, rows)


def test_samples_of_wide_inputs_are_shorter() -> None:
    assert sample_rows(384) == 512
    assert sample_rows(4096) * 4096 == SAMPLE_VALUES
    assert sample_rows(10**8) == 1


def test_stored_with_the_gram_matrix(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model, inputs = example.model(), example.inputs(batch=6)
    seen: list[torch.Tensor] = []
    site = "bert.encoder.layer.1.output.dense"
    handle = model.get_submodule(site).register_forward_pre_hook(
        lambda module, args: seen.append(args[0][inputs["attention_mask"].bool()])
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    files: dict[str, Path] = {}
    for _, found in calibrate(model, example.units(), [inputs], tmp_path):
        files |= found
    stats = load_stats(files["layers.1.ffn"])[site]
    assert stats.low is not None
    assert stats.high is not None
    assert stats.sample is not None
    torch.testing.assert_close(stats.low, seen[0].amin(0))
    torch.testing.assert_close(stats.high, seen[0].amax(0))
    torch.testing.assert_close(stats.sample, seen[0])
