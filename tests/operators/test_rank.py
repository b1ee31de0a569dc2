"""Low rank against the closed-form optimum in float64, and against others of the same rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autocomp.calibrate.stats import SiteStats, load_stats, save_stats
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import ModelError, UserError
from autocomp.core.unit import Site, SiteFormat
from autocomp.library.build import relative_errors
from autocomp.operators import apply_option, apply_step, option_formats, unit_options
from autocomp.operators.factorize.factors import factor_stats, multiplied
from autocomp.operators.factorize.rank import OPERATOR, rank_for
from autocomp.operators.gram import damping_for, output_error
from autocomp.operators.protocol import Rule
from autocomp.testing.operator_examples import (
    attention,
    embedding,
    example_state,
    example_stats,
    ffn,
    head,
)

HALF = Step.of("rank", ratio=0.6)


def _damped_moment(stats: SiteStats, centred: bool) -> np.ndarray:
    gram = stats.gram.double().numpy()
    if centred:
        mean = stats.mean.double().numpy()
        gram = gram - stats.count * np.outer(mean, mean)
    ridge = damping_for(len(gram), stats.count) * np.diag(gram).mean()
    return gram + ridge * np.eye(len(gram))


@pytest.mark.parametrize("bias", [True, False])
def test_error_is_the_closed_form_optimum(bias: bool) -> None:
    """‖(W − Ŵ) L‖² is the sum of the squared singular values of W L that were cut off."""
    unit = ffn(bias=bias)
    state, stats = example_state(unit), example_stats(unit)
    after = multiplied(OPERATOR.apply(unit, state, HALF, stats))
    for site in unit.sites:
        moment = _damped_moment(stats[site.name], bias)
        weight = state[site.name].weight.double().numpy()
        values = np.linalg.svd(weight @ np.linalg.cholesky(moment), compute_uv=False)
        rank = rank_for(state[site.name].format, 0.6)
        difference = weight - after[site.name].weight.double().numpy()
        assert np.linalg.matrix_rank(after[site.name].weight.numpy(), tol=1e-3) == rank
        found = np.trace(difference @ moment @ difference.T)
        np.testing.assert_allclose(found, (values[rank:] ** 2).sum(), rtol=1e-5)


def test_nothing_else_of_that_rank_does_better() -> None:
    """The plain SVD, and random row spaces with the best fit onto each, on the inputs themselves.

    400 tokens of 24 inputs: the damping hardly moves the optimum.
    """
    unit = ffn(bias=False)
    state, stats = example_state(unit), example_stats(unit)
    name = unit.sites[0].name
    after = multiplied(OPERATOR.apply(unit, state, HALF, stats))[name].weight.double()
    weight, gram = state[name].weight.double(), stats[name].gram.double()
    rank = rank_for(state[name].format, 0.6)
    ours = output_error(weight - after, gram)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = left[:, :rank] * values[:rank] @ right[:rank]
    assert ours < 0.9 * output_error(weight - plain, gram)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        rows = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64)
        fit = weight @ gram @ rows.t() @ torch.linalg.inv(rows @ gram @ rows.t())
        assert ours < output_error(weight - fit @ rows, gram)


def test_the_bias_keeps_the_mean_output() -> None:
    unit = ffn()
    state, stats = example_state(unit), example_stats(unit)
    after = multiplied(OPERATOR.apply(unit, state, HALF, stats))
    for site in unit.sites:
        mean = stats[site.name].mean
        before = state[site.name].weight @ mean + state[site.name].bias
        now = after[site.name].weight @ mean + after[site.name].bias
        torch.testing.assert_close(now, before, rtol=1e-4, atol=1e-4)


def test_a_table_is_cut_where_its_used_rows_lose_least() -> None:
    """Weighted by counts + 1 the squared error is the closed form; unused rows pay for it."""
    unit = embedding()
    state = example_state(unit)
    seen = torch.zeros(50, dtype=torch.int64)
    seen[:10] = 100
    stats = {"table": SiteStats(torch.empty(0, 0), torch.empty(0), 1000, seen)}
    after = multiplied(OPERATOR.apply(unit, state, HALF, stats))["table"].weight.double()
    table = state["table"].weight.double()
    weights = (seen + 1).double().sqrt()[:, None]
    rank = rank_for(state["table"].format, 0.6)
    values = torch.linalg.svdvals(weights * table)
    error = (weights * (table - after)).square().sum()
    torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-4, atol=0)
    blind = multiplied(OPERATOR.apply(unit, state, HALF, {}))["table"].weight
    used = slice(0, 10)
    lost = (state["table"].weight - blind)[used].square().sum()
    assert (table - after)[used].square().sum() < 0.5 * lost


def test_ratios_become_ranks_that_save() -> None:
    big = SiteFormat(1536, 384, True)
    assert rank_for(big, 0.5) == 152  # 0.5 × 307.2, to a multiple of 8
    assert rank_for(big, 0.001) == 8
    for ratio in (0.75, 0.5, 0.25):
        rank = rank_for(big, ratio)
        assert abs(rank * (1536 + 384) / (1536 * 384) - ratio) < 8 * 1920 / (1536 * 384)
    assert rank_for(SiteFormat(12, 12, True), 0.5) is None


def test_options_are_the_distinct_shapes() -> None:
    unit = ffn()
    steps = OPERATOR.options(unit, Rule({"rank": [1.0, 0.6, 0.61, 0.4]}))
    assert steps == [None, HALF]  # 0.61 and 0.4 round to the same 8 columns
    assert OPERATOR.options(unit, Rule({"width": [0.5]})) == []
    rule = Rule({"rank": [1.0, 0.5]})
    assert OPERATOR.options(head(), rule) == [None]  # three labels: two factors hold no fewer
    words = replace(head(), sites=(Site("lm_head", "head", 96, 24, False),))
    assert OPERATOR.options(words, rule) == [None, Step.of("rank", ratio=0.5)]
    with pytest.raises(UserError, match=r"must be in \(0, 1\], not 2"):
        OPERATOR.options(unit, Rule({"rank": [2]}))


def test_structure_offers_rank_beside_heads_and_width() -> None:
    """Alternatives within the stage; bits come on top of each."""
    bits = {"method": "rtn", "weights": ["dense", 8]}
    options = unit_options(attention(), Rule({"heads": [1.0, 0.5], "rank": [1.0, 0.6]}, bits))
    labels = {" ".join(step.operator for step in option.steps) for option in options}
    assert labels == {"", "heads", "rank", "rtn", "heads rtn", "rank rtn"}


def test_factors_have_statistics_of_what_they_read() -> None:
    """Against the inputs themselves, sent through the first factor."""
    unit = ffn()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 24, generator=generator) + 1
    up = unit.sites[0].name
    stats = {**example_stats(unit), up: SiteStats(inputs.t() @ inputs, inputs.mean(0), 300)}
    state = OPERATOR.apply(unit, example_state(unit), HALF, stats)
    extended = factor_stats(state, stats)
    assert extended[f"{up}.first"] is stats[up]
    seen = inputs @ state[f"{up}.first"].weight.t()
    found = extended[f"{up}.second"]
    torch.testing.assert_close(found.gram, seen.t() @ seen, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found.mean, seen.mean(0), rtol=1e-4, atol=1e-4)
    assert found.count == 300
    assert factor_stats(state, stats)[f"{up}.second"] is found


@pytest.mark.parametrize("unit", [attention(), ffn(gated=True, bias=False)], ids=lambda u: u.kind)
def test_gptq_takes_the_factors(unit) -> None:
    """Formats agree, query, key and value share their factorisation, and it beats rounding."""
    state, stats = example_state(unit), example_stats(unit)
    errors = {}
    for method in ("gptq", "rtn"):
        step = Step.of(method, weights=4, activations=32, group=16)
        option = Option((HALF, step))
        after = apply_option(unit, state, option, stats)
        assert {n: s.format for n, s in after.items()} == option_formats(unit, option)
        assert all(site.codes is not None for site in after.values())
        errors[method] = relative_errors(state, state, after, stats)
        assert set(errors[method]) == {site.name for site in unit.sites}
    assert sum(errors["gptq"].values()) < sum(errors["rtn"].values())


def test_relative_error_is_that_of_the_product() -> None:
    unit = ffn(bias=False)
    state, stats = example_state(unit), example_stats(unit)
    after = apply_step(unit, state, HALF, stats)
    errors = relative_errors(state, state, after, stats)
    name = unit.sites[0].name
    weight, gram = state[name].weight, stats[name].gram
    change = weight - after[f"{name}.second"].weight @ after[f"{name}.first"].weight
    expected = output_error(change, gram) / output_error(weight, gram)
    assert errors[name] == pytest.approx(expected, rel=1e-3)
    assert 0 < errors[name] < 1


@pytest.mark.parametrize("unit", [ffn(), embedding()], ids=lambda unit: unit.kind)
def test_weights_that_are_not_finite_are_refused_by_name(unit) -> None:
    state, name = example_state(unit), unit.sites[-1].name
    weight = state[name].weight.clone()
    weight[3, 5] = float("nan")
    state[name] = replace(state[name], weight=weight)
    with pytest.raises(ModelError, match=f"{name}.weight holds NaN"):
        OPERATOR.apply(unit, state, HALF, example_stats(unit))


def test_a_rank_deficient_gram_is_no_obstacle() -> None:
    """Ten directions of input, twenty-four inputs: rank 8 keeps nearly all of the output."""
    unit = ffn(bias=False)
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -3, 10)
    inputs = torch.randn(50_000, 10, generator=generator) * spread
    inputs = inputs @ torch.randn(10, 24, generator=generator)
    state, stats = example_state(unit), dict(example_stats(unit))
    name = unit.sites[0].name
    stats[name] = SiteStats(inputs.t() @ inputs, inputs.mean(0), len(inputs))
    after = OPERATOR.apply(unit, state, HALF, stats)
    assert relative_errors(state, state, after, stats)[name] < 1e-3


def test_counts_of_rows_are_kept_in_files(tmp_path) -> None:
    stats = {"table": SiteStats(torch.empty(0, 0), torch.empty(0), 7, torch.tensor([3, 0, 4]))}
    save_stats(tmp_path / "embeddings.safetensors", stats)
    loaded = load_stats(tmp_path / "embeddings.safetensors")["table"]
    assert loaded.count == 7
    assert loaded.rows is not None
    assert loaded.rows.tolist() == [3, 0, 4]
