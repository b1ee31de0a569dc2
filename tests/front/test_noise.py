"""The bootstrap against closed forms and against scipy's on the same data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta, bootstrap, norm

from autocomp.front.noise import RESAMPLES, Noise, resampled_means
from autocomp.study.per_example import ExampleScores

Z = norm.ppf(0.975)


def scores_of(**values: np.ndarray) -> dict[str, ExampleScores]:
    return {name: ExampleScores(np.asarray(its, np.float64), "s") for name, its in values.items()}


def accuracies(**values: np.ndarray) -> Noise:
    return Noise.of({n: float(np.mean(v)) for n, v in values.items()}, scores_of(**values))


def perplexities(**values: np.ndarray) -> Noise:
    qualities = {n: float(np.exp(np.mean(v))) for n, v in values.items()}
    return Noise.of(qualities, scores_of(**values))


def pair(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two models that mostly err on the same examples."""
    rng = np.random.default_rng(seed)
    one = rng.random(count) < 0.9
    two = np.where(rng.random(count) < 0.05, ~one, one)
    return one.astype(float), two.astype(float)


def test_an_accuracy_has_the_binomial_s_normal_interval_on_many_examples() -> None:
    right, _ = pair(5000)
    found = accuracies(a=right).quality("a")
    assert found is not None
    p = right.mean()
    error = math.sqrt(p * (1 - p) / len(right))
    assert found.value == p
    assert found.standard_error == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(p - Z * error, abs=0.1 * error)
    assert found.high == pytest.approx(p + Z * error, abs=0.1 * error)


def test_a_difference_is_paired() -> None:
    """McNemar's variance: only the examples that the two answer differently count."""
    one, two = pair(5000)
    found = accuracies(a=one, b=two).difference("a", "b")
    assert found is not None
    gap = one.mean() - two.mean()
    error = math.sqrt(((one - two) ** 2).mean() - gap**2) / math.sqrt(len(one))
    assert found.value == pytest.approx(gap)
    assert found.standard_error == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(gap - Z * error, abs=0.1 * error)
    assert found.high == pytest.approx(gap + Z * error, abs=0.1 * error)
    unpaired = math.sqrt(one.var() / len(one) + two.var() / len(two))
    assert found.standard_error < 0.6 * unpaired


def test_a_ratio_of_perplexities_has_the_normal_interval_of_its_logarithm() -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(-4.0, 0.8, size=2000)
    two = one + rng.normal(0.05, 0.2, size=2000)
    noise = perplexities(a=one, b=two)
    found, whole = noise.ratio("a", "b"), noise.quality("a")
    assert found is not None
    assert whole is not None
    gaps = one - two
    error = gaps.std() / math.sqrt(len(gaps))
    assert found.value == pytest.approx(math.exp(gaps.mean()))
    assert math.log(found.low) == pytest.approx(gaps.mean() - Z * error, abs=0.1 * error)
    assert math.log(found.high) == pytest.approx(gaps.mean() + Z * error, abs=0.1 * error)
    error = one.std() / math.sqrt(len(one))
    assert math.log(whole.low) == pytest.approx(one.mean() - Z * error, abs=0.1 * error)


@pytest.mark.parametrize("kind", ["accuracy", "perplexity"])
def test_intervals_are_those_of_scipy_on_the_same_data(kind: str) -> None:
    rng = np.random.default_rng(2)
    if kind == "accuracy":
        (one, two), noise_of, whole = pair(300, 3), accuracies, np.mean
    else:
        one, two = -rng.gamma(2.0, 1.0, (2, 60))  # skewed, few
        two = 0.8 * one + 0.2 * two
        noise_of = perplexities

        def whole(x: np.ndarray, axis: int = -1) -> np.ndarray:
            return np.exp(np.mean(x, axis=axis))

    def gap(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return whole(x, axis=axis) - whole(y, axis=axis)

    noise = noise_of(a=one, b=two)
    for found, data, statistic in (
        (noise.quality("a"), (one,), whole),
        (noise.difference("a", "b"), (one, two), gap),
    ):
        theirs = bootstrap(
            data, statistic, paired=True, vectorized=True, method="percentile", rng=5,
            n_resamples=20_000,
        )  # fmt: skip
        assert found is not None
        step = 1 / len(one) if kind == "accuracy" else 0.0  # accuracies come in steps
        near = 0.1 * theirs.standard_error + step
        assert found.standard_error == pytest.approx(theirs.standard_error, rel=0.05)
        assert found.low == pytest.approx(theirs.confidence_interval.low, abs=near)
        assert found.high == pytest.approx(theirs.confidence_interval.high, abs=near)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        one = rng.random(200) < 0.85
        two = np.where(rng.random(200) < 0.1, rng.random(200) < 0.85, one)
        found = accuracies(a=one, b=two).difference("a", "b")
        assert found is not None
        hits += found.holds(0.0)
    assert 0.9 <= hits / 200 <= 0.99


def test_it_is_seeded_and_the_company_does_not_matter() -> None:
    one, two = pair(300)
    alone, together = accuracies(b=two), accuracies(a=one, b=two)
    assert alone.quality("b") == together.quality("b") == accuracies(a=one, b=two).quality("b")
    forth, back = together.difference("a", "b"), together.difference("b", "a")
    assert forth is not None
    assert back is not None
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    same = together.difference("a", "a")
    assert same is not None
    assert (same.value, same.standard_error) == (0, 0)


def test_answers_that_are_all_right_are_no_certainty() -> None:
    """The exact bound: all right in 100 is likely (5%) even where 3% are wrong."""
    right = np.ones(100)
    noise = accuracies(a=right, b=right.copy())
    found, gap, ratio = noise.quality("a"), noise.difference("a", "b"), noise.ratio("a", "b")
    assert found is not None
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(beta.ppf(0.05, 100, 1), abs=0.001)
    for pair_of in (gap, ratio):
        assert pair_of is not None
        assert (pair_of.high - pair_of.low) / 2 == pytest.approx(0.03)
        assert pair_of.standard_error == 0
    never = accuracies(a=0 * right).quality("a")
    assert never is not None
    assert (never.low, never.high) == (0, pytest.approx(0.03))
    rng = np.random.default_rng(0)
    likelihoods = rng.normal(-3, 1, 100)
    copies = perplexities(a=likelihoods, b=likelihoods.copy()).difference("a", "b")
    assert copies is not None
    assert (copies.low, copies.high) == (0, 0), "one model, to the last digit, is one model"


def test_draws_in_parts_are_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.stack(pair(300))
    whole = resampled_means(scores)
    assert whole.shape == (2, RESAMPLES)
    monkeypatch.setattr("autocomp.front.noise._AT_ONCE", 300 * 7)
    parts = resampled_means(scores)
    assert parts.shape == whole.shape
    assert parts.mean(1) == pytest.approx(scores.mean(1), abs=0.002)
    assert parts.std(1) == pytest.approx(whole.std(1), rel=0.05)


def test_what_cannot_be_compared_has_no_interval() -> None:
    one, two = pair(300)
    scores = scores_of(a=one, b=two)
    qualities = {"a": float(one.mean()), "b": float(two.mean()), "unscored": 0.9}
    for broken in (
        {**scores, "b": ExampleScores(two, "other examples")},
        {**scores, "b": ExampleScores(two[:-1], "s")},
        {**scores, "b": ExampleScores(two + 0.1, "s")},  # of another trial: not its quality
        {**scores, "b": ExampleScores(np.full(300, np.nan), "s")},
        {"a": scores["a"]},
    ):
        noise = Noise.of(qualities, broken)
        assert noise.difference("a", "b") is noise.ratio("b", "a") is None
        assert noise.quality("a") is not None
        assert noise.quality("unscored") is None
    assert Noise.of({}, scores).quality("a") is None
    assert Noise().quality("a") is None
    never = accuracies(a=one, b=np.zeros(300))
    assert never.ratio("a", "b") is None
    assert never.difference("a", "b") is not None
