"""Scores between the ends of a family: against a real softmax, and where ends break."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autocomp.core.candidate import Option, Step
from autocomp.core.unit import Unit
from autocomp.search.scores import LocalError, LocalErrors, interpolated, replace_one, to_score
from autocomp.search.space import Space

UNIT = "layers.0.ffn"
DENSE = Option()


def option(size: int, keep: int | None = None) -> Option:
    pruned = () if keep is None else (Step.of("width", keep=keep),)
    return Option((*pruned, Step.of("rtn", weights=size)))


def space_of(*options: Option) -> Space:
    return Space([Unit(UNIT, "ffn", (), layer=0)], {UNIT: options})


def asked(
    space: Space, known: dict[str, float | None], local: LocalErrors | None = None
) -> list[Option]:
    found = to_score(space, {UNIT: known}, local)
    for unit, wanted, candidate in found:
        assert candidate[unit] == wanted
    return [wanted for _, wanted, _ in found]


def test_without_local_errors_every_option_is_scored() -> None:
    space = space_of(DENSE, *map(option, (8, 4, 3)))
    assert to_score(space, {}) == replace_one(space)
    assert asked(space, {option(4).key: None}) == [option(8), option(3)]


def test_a_rounded_layer_scores_as_its_local_error_says() -> None:
    """softmax(Wx): KL to the true one by one, against the line through dense and the coarsest."""
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(7, 24)) / 5, rng.normal(size=(24, 400))

    def rounded(bits: int) -> np.ndarray:
        step = np.abs(weight).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        return np.asarray(np.round(weight / step) * step)

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=0)))

    def kl(other: np.ndarray) -> float:
        p, q = log_softmax(weight @ x), log_softmax(other @ x)
        return float((np.exp(p) * (p - q)).sum(axis=0).mean())

    options = {option(bits): rounded(bits) for bits in (8, 6, 5, 4)}
    energy = float(((weight @ x) ** 2).sum())
    errors = {one: float((((w - weight) @ x) ** 2).sum()) / energy for one, w in options.items()}
    local = {
        UNIT: {
            DENSE.key: LocalError("", 0.0),
            **{one.key: LocalError("", error) for one, error in errors.items()},
        }
    }
    space = space_of(DENSE, *options)
    coarsest = option(4)
    assert asked(space, {}, local) == [coarsest]
    known = {coarsest.key: kl(options[coarsest])}
    assert asked(space, known, local) == []
    scores = interpolated(space, {UNIT: known}, local)
    for one, other in options.items():
        assert scores.of(UNIT, one) == pytest.approx(kl(other), rel=0.35)
    assert scores.of(UNIT, coarsest) == known[coarsest.key]
    assert scores.of(UNIT, DENSE) == 0


def test_a_family_without_dense_begins_at_its_mildest() -> None:
    """What all have in common is no part of the local errors' doing."""
    options = [option(bits, keep=64) for bits in (8, 4, 3, 2)]
    rows = dict(zip([one.key for one in options], (0.1, 0.15, 0.3, 0.5), strict=True))
    local = {
        UNIT: {
            DENSE.key: LocalError("plain", 0.0),
            **{key: LocalError("half", error) for key, error in rows.items()},
        }
    }
    space = space_of(DENSE, *options)
    assert asked(space, {}, local) == [options[0], options[-1]]
    known = {options[0].key: 2.0, options[-1].key: 4.0}
    scores = interpolated(space, {UNIT: known}, local)
    assert [scores.of(UNIT, one) for one in options] == pytest.approx([2.0, 2.25, 3.0, 4.0])


def test_where_the_coarsest_breaks_the_model_the_next_is_scored() -> None:
    options = [option(bits) for bits in (8, 4, 3, 2)]
    local = {
        UNIT: {
            DENSE.key: LocalError("", 0.0),
            **{one.key: LocalError("", at + 1.0) for at, one in enumerate(options)},
        }
    }
    space = space_of(DENSE, *options)
    known: dict[str, float | None] = {options[3].key: None}
    assert asked(space, known, local) == [options[2]]
    known[options[2].key] = math.nan
    assert asked(space, known, local) == [options[1]]
    known[options[1].key] = 1.0
    assert asked(space, known, local) == []
    scores = interpolated(space, {UNIT: known}, local)
    assert [scores.of(UNIT, one) for one in options] == [0.5, 1.0, math.inf, math.inf]
    for one in options:
        known[one.key] = None
    assert asked(space, known, local) == []
    assert interpolated(space, {UNIT: known}, local).of(UNIT, options[0]) == math.inf


def test_what_was_scored_stays() -> None:
    options = [option(bits) for bits in (8, 4, 3)]
    errors = dict(zip([one.key for one in options], (1.0, 2.0, 4.0), strict=True))
    local = {
        UNIT: {
            DENSE.key: LocalError("", 0.0),
            **{key: LocalError("", error) for key, error in errors.items()},
        }
    }
    space = space_of(DENSE, *options)
    known = {options[1].key: 0.9, options[2].key: 1.0}
    scores = interpolated(space, {UNIT: known}, local)
    assert [scores.of(UNIT, one) for one in options] == pytest.approx([0.45, 0.9, 1.0])
    noisy = {options[2].key: -1e-9}
    scores = interpolated(space, {UNIT: noisy}, local)
    assert [scores.of(UNIT, one) for one in options] == [0, 0, 0]
