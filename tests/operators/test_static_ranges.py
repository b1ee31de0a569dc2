"""Ranges of static activations against brute force; the grid they make; per-site choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from autocomp.calibrate.stats import SiteStats
from autocomp.core.activation_grid import float32, static_grid
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import InternalError, UserError
from autocomp.operators import apply_option, option_formats, rule_of, unit_options
from autocomp.operators.quantize.ranges import FRACTIONS, static_range
from autocomp.spec.space import RuleSection
from autocomp.testing.operator_examples import (
    attention,
    embedding,
    example_state,
    example_stats,
    ffn,
    head,
)


def stats_of(inputs: torch.Tensor, sampled: int | None = None) -> SiteStats:
    low, high = torch.aminmax(inputs, dim=0)
    sample = inputs[: sampled or len(inputs)]
    gram, mean = inputs.T @ inputs, inputs.mean(0)
    return SiteStats(gram, mean, len(inputs), low=low, high=high, sample=sample)


def through(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 and back as ONNX's QuantizeLinear does it; float64 throughout."""
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["normal", "heavy", "one-sided", "shifted"])
def test_mse_range_is_as_good_as_brute_force(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 16, generator=generator)
    if kind == "heavy":
        x = x.sign() * x.abs() ** 4
    elif kind == "one-sided":
        x = torch.nn.functional.gelu(2 * x)
    elif kind == "shifted":
        x = x + 5
    low, high = static_range(stats_of(x), "mse")
    values = x.double().numpy()
    ends = min(values.min(), 0.0), max(values.max(), 0.0)
    # Brute force: every pair of fractions, the arithmetic itself.
    pairs = [(ends[0] * a, ends[1] * b) for a in FRACTIONS[:40:2] for b in FRACTIONS[:40:2]]
    least = min(((through(values, *pair) - values) ** 2).mean() for pair in pairs)
    reached = ((through(values, low, high) - values) ** 2).mean()
    assert reached < 1.1 * least
    minmax = ((through(values, *ends) - values) ** 2).mean()
    assert reached < 1.02 * minmax


def test_mse_clips_what_is_rare() -> None:
    x = torch.rand(300, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stats = replace(stats_of(x), count=300_000)  # the sample stands for a thousand times as much
    assert stats.high is not None
    stats.high[4] = 3.0  # seen once
    assert static_range(stats, "minmax")[1] == 3.0
    low, high = static_range(stats, "mse")
    assert -1.0 <= low < -0.9
    assert 0.99 < high < 1.3


def test_minmax_is_of_all_tokens_percentile_of_the_sample() -> None:
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[3999, 2] = 1000.0  # seen by the extremes alone
    stats = stats_of(x, sampled=3000)
    assert static_range(stats, "minmax") == (float(x.min()), 1000.0)
    low, high = static_range(stats, "percentile")
    values = np.sort(x[:3000].numpy().flatten())
    assert (values < low).sum() == round(1e-4 * (len(values) - 1))
    assert (values > high).sum() == round(1e-4 * (len(values) - 1))
    low, high = static_range(stats, "mse")
    assert 900 < high <= 1000  # clipping it would cost more than coarse steps do


def test_ranges_follow_kept_columns_and_scales() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    kept, scale = torch.tensor([0, 2, 5]), torch.tensor([0.5, 4.0, 1.0])
    stats = stats_of(x)
    for method in ("minmax", "percentile", "mse"):
        found = static_range(stats, method, kept, scale)
        expected = static_range(stats_of(x[:, kept] * scale), method)
        assert found == pytest.approx(expected, rel=1e-5)
        assert static_range(stats, method) != found
        assert all(float32(end) == end for end in found)


def test_degenerate_ranges() -> None:
    for method in ("minmax", "percentile", "mse"):
        assert static_range(stats_of(torch.zeros(1, 4)), method) == (0.0, 0.0)
        low, high = static_range(stats_of(torch.full((1, 4), 3.0)), method)
        assert low == 0.0
        assert 0 < high <= 3.0
    with pytest.raises(InternalError, match="no range method"):
        static_range(stats_of(torch.ones(1, 1)), "median")


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [(0.0, 2.55, 0.01, 0), (-1.28, 1.27, 0.01, 128), (-2.55, 0.0, 0.01, 255), (1.0, 2.55, 0.01, 0)],
)
def test_the_grid_of_a_range(low: float, high: float, scale: float, zero: int) -> None:
    found = static_grid(low, high)
    assert found == (float(np.float32(scale)), zero)


def test_a_grid_needs_a_range() -> None:
    assert static_grid(0.0, 0.0) == (1.0, 0)
    for bad in ((1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(InternalError, match="no range of activations"):
            static_grid(*bad)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq", "awq_gptq"])
def test_every_method_takes_static_activations(method: str) -> None:
    unit = attention()
    state, stats = example_state(unit), example_stats(unit)
    step = Step.of(method, weights=8, activations=8, group=0, range="minmax")
    option = Option((Step.of("heads", keep=2), step))
    for name, site in apply_option(unit, state, option, stats).items():
        entry = stats[name]
        assert entry.low is not None
        assert entry.high is not None
        low, high = entry.low, entry.high
        if site.kept_columns is not None:
            low, high = low[site.kept_columns], high[site.kept_columns]
        if site.input_scale is not None:
            low, high = low * site.input_scale, high * site.input_scale
        assert site.format.static
        assert site.input_range == (min(float(low.min()), 0.0), max(float(high.max()), 0.0))


def test_factors_of_a_low_rank_site_have_ranges_of_their_own() -> None:
    unit = ffn()
    state, stats = example_state(unit), example_stats(unit)
    rank = Step.of("rank", ratio=0.9)
    plain = apply_option(unit, state, Option((rank,)), stats)
    for method, more in (("awq", {}), ("smoothquant", {"migration": 0.5})):
        step = Step.of(method, weights=8, activations=8, group=0, range="minmax", **more)
        after = apply_option(unit, state, Option((rank, step)), stats)
        assert {n: s.format for n, s in after.items()} == option_formats(unit, Option((rank, step)))
        first, second = (f"layers.0.ffn.up.{part}" for part in ("first", "second"))
        assert after[first].format.scaled
        assert after[second].format.scaled is (method == "awq")
        between = stats["layers.0.ffn.up"].sample @ plain[first].weight.T  # type: ignore[operator]
        if after[second].input_scale is not None:
            between = between * after[second].input_scale
        ends = (min(float(between.min()), 0.0), max(float(between.max()), 0.0))
        assert after[second].input_range == pytest.approx(ends, rel=1e-5)


def options(unit: Any, **bits: Any) -> list[str]:
    section = RuleSection.model_validate({"match": "*", "bits": bits})
    return [option.label() for option in unit_options(unit, rule_of(section))]


def test_static_activations_are_a_choice_beside_dynamic_ones() -> None:
    found = options(head(), method="rtn", weights=["dense", 8], activations=[8, "static"])
    assert found == [
        "dense",
        "rtn activations=8 group=0 weights=8",
        "rtn activations=8 group=0 range=mse weights=8",
    ]
    assert options(embedding(), method="rtn", weights=[8], activations=["static"]) == [
        "rtn activations=32 group=0 weights=8"
    ]


def test_one_group_of_sites_may_be_spared() -> None:
    found = options(attention(), method="gptq", weights=[8, 4], group=16, per_site=True)
    assert found == [
        "gptq activations=32 group=0 weights=8",
        "gptq activations=32 group=16 weights=4",
        "gptq activations=32 group=16 spare=query+key spare_weights=8 weights=4",
        "gptq activations=32 group=16 spare=value spare_weights=8 weights=4",
        "gptq activations=32 group=16 spare=output spare_weights=8 weights=4",
    ]
    gated = options(ffn(gated=True), weights=[8, 4, 3], group=16, per_site=True)
    spared = [label.split("spare=")[1].split(" ")[0] for label in gated if "spare=" in label]
    assert spared == ["gate+up", "down", "gate+up", "down"]
    assert len(options(head(), weights=[8, 4], per_site=True)) == 2  # nothing else to spare


def test_formats_and_weights_of_a_spared_unit() -> None:
    unit = attention()
    step = Step.of("gptq", weights=4, activations=8, group=16, spare="value", spare_weights=8)
    formats = option_formats(unit, Option((step,)))
    bits = {site.role: formats[site.name].weight_bits for site in unit.sites}
    assert bits == {"query": 4, "key": 4, "value": 8, "output": 4}
    assert [f.group for f in formats.values()] == [16, 16, None, 16]
    state, stats = example_state(unit), example_stats(unit)
    after = apply_option(unit, state, Option((step,)), stats)
    uniform = apply_option(
        unit, state, Option((Step.of("gptq", weights=8, group=0, activations=8),)), stats
    )
    value = next(site.name for site in unit.sites if site.role == "value")
    torch.testing.assert_close(after[value].weight, uniform[value].weight, atol=0.05, rtol=0)
    assert {n: s.format for n, s in after.items()} == formats


@pytest.mark.parametrize(
    ("unit", "bits", "message"),
    [
        (head(), {"weights": [8], "activations": ["fixed"]}, "Input should be"),
        (head(), {"weights": [8], "range": "median"}, "minmax"),
        (embedding(), {"method": "awq", "weights": [8]}, "Allowed there: rtn, hqq"),
        (embedding(), {"method": ["awq", "gptq"], "weights": [8]}, "Allowed there: rtn, hqq"),
        (ffn(), {"method": "smoothquant", "weights": [4]}, "asks for neither"),
        (ffn(), {"method": "smoothquant", "weights": [8]}, "asks for neither"),
    ],
)
def test_choices_that_make_no_sense(unit: Any, bits: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        options(unit, **bits)


def test_smoothquant_takes_what_is_its_own() -> None:
    found = options(
        ffn(),
        method=["gptq", "smoothquant"],
        weights=["dense", 8, 4],
        activations=["dense", 8, "static"],
        migration=[0.5, 0.8],
        group=16,
    )
    assert [label for label in found if label.startswith("smoothquant")] == [
        "smoothquant activations=8 group=0 migration=0.5 weights=8",
        "smoothquant activations=8 group=0 migration=0.8 weights=8",
        "smoothquant activations=8 group=0 migration=0.5 range=mse weights=8",
        "smoothquant activations=8 group=0 migration=0.8 range=mse weights=8",
    ]
    assert len(found) == 1 + 2 * 3 + 4
    assert options(embedding(), method=["smoothquant", "hqq"], weights=["dense", 8]) == [
        "dense",
        "hqq activations=32 group=0 weights=8",
    ]
