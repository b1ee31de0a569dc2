"""Structured pruning against brute force, closed forms and the model's own behaviour."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from autocomp.core.candidate import Option, Step
from autocomp.operators import apply_option
from autocomp.operators.gram import compensate, output_error
from autocomp.operators.protocol import SiteStats, UnitStats
from autocomp.operators.prune.structured import RemovalOrder
from autocomp.testing.operator_examples import attention, example_state, ffn


def inputs(columns: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mean = torch.randn(columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing + mean


def best_error(weight: torch.Tensor, gram: torch.Tensor, columns: list[int]) -> float:
    """Output error when only `columns` remain, re-fitted by float64 least squares."""
    gram, weight = gram.double(), weight.double()
    kept = torch.tensor(columns)
    fitted = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight.t()).t()
    full = torch.zeros_like(weight)
    full[:, kept] = fitted
    return output_error(weight - full, gram)


@pytest.mark.parametrize(("groups", "size", "keep"), [(6, 4, 3), (8, 1, 4), (9, 1, 3)])
def test_greedy_choice_is_close_to_the_best_of_all_subsets(
    groups: int, size: int, keep: int
) -> None:
    ratios = []
    for seed in range(8):
        weight = torch.randn(5, groups * size, generator=torch.Generator().manual_seed(100 + seed))
        x = inputs(groups * size, 500, seed)
        gram = x.t() @ x

        def columns(chosen: tuple[int, ...]) -> list[int]:
            return [group * size + offset for group in chosen for offset in range(size)]

        errors = {
            chosen: best_error(weight, gram, columns(chosen))
            for chosen in combinations(range(groups), keep)
        }
        gone = RemovalOrder(weight, gram, size, 1e-6).first(groups - keep)
        greedy = tuple(group for group in range(groups) if group not in gone)
        ratios.append(errors[greedy] / min(errors.values()))
        worst = max(errors.values())
        assert errors[greedy] < 0.5 * worst + 0.5 * min(errors.values())
    assert max(ratios) < 1.6, ratios
    assert sum(ratios) / len(ratios) < 1.15, ratios


def test_batches_choose_nearly_as_well_as_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    x = inputs(256, 2000, 1)
    gram = x.t() @ x
    batched = RemovalOrder(weight, gram, 1, 0.01).first(128)
    monkeypatch.setattr("autocomp.operators.prune.structured.ROUNDS", 10**9)
    single = RemovalOrder(weight, gram, 1, 0.01).first(128)

    def error(gone: list[int]) -> float:
        return best_error(weight, gram, [c for c in range(256) if c not in set(gone)])

    assert error(batched) < 1.03 * error(single)


def test_twins_are_not_both_removed_for_the_other_ones_sake() -> None:
    """Either of two equal channels is free to remove, both are not; also within one batch."""
    x = inputs(128, 1500, 0)
    x[:, 64:] = x[:, :64] + 1e-3 * torch.randn(1500, 64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    gone = RemovalOrder(weight, x.t() @ x, 1, 1e-6).first(60)
    assert len({channel % 64 for channel in gone}) == 60


def test_the_order_does_not_depend_on_how_it_is_asked_for() -> None:
    weight, x = torch.randn(4, 130, generator=torch.Generator().manual_seed(0)), inputs(130, 400, 3)
    at_once = RemovalOrder(weight, x.t() @ x, 1, 0.01).first(100)
    piecemeal = RemovalOrder(weight, x.t() @ x, 1, 0.01)
    for count in (1, 7, 50, 100):
        assert piecemeal.first(count) == at_once[:count]


def test_compensation_is_least_squares() -> None:
    weight, x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)), inputs(20, 300, 0)
    kept = torch.tensor([0, 3, 4, 8, 11, 12, 19])
    fitted = compensate(weight, x.t() @ x, kept, damping=0.0)
    outputs = x.double() @ weight.double().t()
    expected = torch.linalg.lstsq(x[:, kept].double(), outputs).solution.t()
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-4, atol=1e-5)


def test_damped_compensation_is_ridge_regression_towards_the_weight() -> None:
    weight, x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)), inputs(20, 30, 0)
    kept = torch.arange(0, 20, 2)
    gram = x.t() @ x
    ridge = (0.1 * gram.diagonal().mean()).double().sqrt()
    # The same problem as plain least squares: extra rows ask the fit to stay near W_K.
    system = torch.cat([x[:, kept].double(), ridge * torch.eye(10, dtype=torch.float64)])
    target = torch.cat([x.double() @ weight.double().t(), ridge * weight[:, kept].double().t()])
    expected = torch.linalg.lstsq(system, target).solution.t()
    fitted = compensate(weight, gram, kept, damping=0.1)
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-4, atol=1e-5)


def test_keeping_everything_changes_nothing() -> None:
    weight, x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)), inputs(20, 30, 0)
    assert torch.equal(compensate(weight, x.t() @ x, torch.arange(20), 0.3), weight)


def stats_of(x: torch.Tensor) -> SiteStats:
    return SiteStats(x.t() @ x, x.mean(dim=0), len(x))


def ffn_stats(x: torch.Tensor) -> UnitStats:
    return {ffn().sites[-1].name: stats_of(x)}


def test_with_a_bias_the_fit_has_an_intercept() -> None:
    """The pruned layer equals float64 least squares with a column of ones, at negligible ridge."""
    unit = ffn()
    state, x = example_state(unit), inputs(96, 60_000, 4)
    after = apply_option(unit, state, Option((Step.of("width", keep=64),)), ffn_stats(x))
    down = unit.sites[-1].name
    site = after[down]
    assert site.bias is not None
    assert site.kept_columns is not None
    outputs = x.double() @ state[down].weight.double().t() + state[down].bias.double()
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    design = torch.cat([x[:, site.kept_columns].double(), ones], dim=1)
    best = (design @ torch.linalg.lstsq(design, outputs).solution - outputs).square().mean()
    fitted = x[:, site.kept_columns].double() @ site.weight.double().t() + site.bias.double()
    assert float((fitted - outputs).square().mean()) < 1.05 * float(best)
    shift = (fitted - outputs).mean(dim=0).abs().max()
    assert float(shift) < 1e-3  # the mean output is kept


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_magnitude_without_compensation(seed: int) -> None:
    unit = ffn()
    state, x = example_state(unit, seed), inputs(96, 300, seed)
    down = unit.sites[-1].name
    weight, bias = state[down].weight, state[down].bias
    outputs = x @ weight.t() + bias
    for keep in (64, 32):
        after = apply_option(unit, state, Option((Step.of("width", keep=keep),)), ffn_stats(x))
        site = after[down]
        ours = x[:, site.kept_columns] @ site.weight.t() + site.bias - outputs
        largest = weight.square().sum(dim=0).topk(keep).indices
        theirs = x[:, largest] @ weight[:, largest].t() + bias - outputs
        assert float(ours.square().sum()) < 0.7 * float(theirs.square().sum())


def test_rows_that_fed_removed_channels_go() -> None:
    unit = ffn(gated=True)
    state, x = example_state(unit), inputs(96, 300, 0)
    after = apply_option(unit, state, Option((Step.of("width", keep=32),)), ffn_stats(x))
    gate, up, down = (site.name for site in unit.sites)
    kept = after[down].kept_columns
    assert kept is not None
    for name in (gate, up):
        assert torch.equal(after[name].weight, state[name].weight[kept])
        assert torch.equal(after[name].bias, state[name].bias[kept])


def test_grouped_heads_go_with_their_keys_and_values() -> None:
    unit = attention(kv_heads=2, bias=False)
    query, key, value, output = (site.name for site in unit.sites)
    state, x = example_state(unit), inputs(32, 300, 0)
    x[:, :16] *= 1e-3  # the first group of two heads says next to nothing
    option = Option((Step.of("heads", keep=2),))
    after = apply_option(unit, state, option, {output: stats_of(x)})
    assert after[output].kept_columns.tolist() == list(range(16, 32))
    assert torch.equal(after[query].weight, state[query].weight[16:])
    assert torch.equal(after[key].weight, state[key].weight[8:])
    assert torch.equal(after[value].weight, state[value].weight[8:])


def test_quantising_after_pruning_uses_the_kept_inputs() -> None:
    """GPTQ on the pruned weight sees the Gram matrix of the kept columns only."""
    unit = ffn()
    state, x = example_state(unit), inputs(96, 2000, 0)
    down, up = unit.sites[-1].name, unit.sites[0].name
    stats = {**ffn_stats(x), up: stats_of(inputs(24, 500, 1))}
    prune, bits = Step.of("width", keep=64), Step.of("gptq", weights=4, activations=32, group=16)
    pruned = apply_option(unit, state, Option((prune,)), stats)
    both = apply_option(unit, state, Option((prune, bits)), stats)
    kept = pruned[down].kept_columns
    assert torch.equal(both[down].kept_columns, kept)
    alone = dict(pruned)
    alone[down] = type(alone[down])(pruned[down].weight, pruned[down].bias, pruned[down].format)
    direct = {up: stats[up], down: stats_of(x[:, kept])}
    expected = apply_option(unit, alone, Option((bits,)), direct)
    difference = both[down].weight - expected[down].weight
    gram = direct[down].gram
    rounded = output_error(pruned[down].weight - both[down].weight, gram)
    assert output_error(difference, gram) < 0.3 * rounded
