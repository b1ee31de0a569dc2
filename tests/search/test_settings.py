"""Distillation settings: what they were with one loss, and how further dimensions are searched."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from autocomp.core.candidate import Distillation
from autocomp.search.settings import Settings
from autocomp.spec.schema import DistilSection, FloatRange

OLDER = DistilSection(
    lr=FloatRange(low=1e-4, high=6e-4, log=True), temperature=[1, 2, 4], tokens=[40000, 80000]
)
FULL = DistilSection(
    loss=["logits", "logits+hidden", "reverse_kl+relations+task", "top_k"],
    weight=FloatRange(low=0.1, high=10, log=True),
    schedule=["cosine", "linear"],
    layers=["each", "last"],
    top_k=[64, 16, 32],
    on_policy=[0.5, 0.0],
    temperature=[1, 2],
    tokens=[0, 1000],
)
COMMON = {"distil.tokens", "distil.lr", "distil.temperature", "distil.loss"}


def test_where_there_is_no_more_choice_settings_are_what_they_were() -> None:
    """Found with the code from before there was more than one loss."""
    settings, rng = Settings(OLDER), np.random.default_rng(0)
    now = settings.spread(0)
    found: list[tuple[int, float, float]] = []
    for index in range(6):
        now = settings.near(now, rng)
        found += [(s.tokens, s.lr, s.temperature) for s in (settings.spread(index), now)]
        assert now == Distillation(now.tokens, now.lr, now.temperature, "logits")
    assert found == [
        (80000, 0.000245, 2.0),
        (40000, 0.000259, 1.0),
        (80000, 0.000157, 1.0),
        (80000, 0.000204, 1.0),
        (80000, 0.000383, 4.0),
        (80000, 0.000312, 1.0),
        (80000, 0.000125, 2.0),
        (80000, 0.000236, 1.0),
        (80000, 0.000306, 1.0),
        (80000, 0.000135, 1.0),
        (80000, 0.000196, 4.0),
        (80000, 0.000162, 1.0),
    ]
    assert set(settings.distributions(now)) == set(settings.to_params(now)) == COMMON


def test_the_first_is_what_the_spec_lists_first() -> None:
    first = Settings(FULL).spread(0)
    assert (first.loss, first.schedule, first.on_policy) == ("logits", "cosine", 0.0)


@pytest.mark.parametrize("draw", ["spread", "near"])
def test_what_makes_no_difference_has_its_default(draw: str) -> None:
    settings, rng = Settings(FULL), np.random.default_rng(1)
    plain, now = Distillation(), settings.spread(1)
    seen: dict[str, set[Any]] = {}
    for index in range(300):
        now = settings.spread(index) if draw == "spread" else settings.near(now, rng)
        if now.tokens == 0:
            assert now == plain
            now = settings.spread(index)
        assert settings.holds(now)
        assert (now.weight == plain.weight) or "+" in now.loss
        assert (now.layers == plain.layers) or "+" in now.loss
        assert (now.top_k == plain.top_k) or now.loss == "top_k"
        for name in vars(now):
            seen.setdefault(name, set()).add(getattr(now, name))
    assert seen["loss"] == set(FULL.loss)
    assert seen["schedule"] == {"cosine", "linear"}
    assert seen["layers"] == {"each", "last"}
    assert seen["top_k"] == {16, 32, 64}
    assert seen["on_policy"] == {0.0, 0.5}
    weights = seen["weight"]
    assert min(weights) < 0.3
    assert max(weights) > 3


def test_spreading_pairs_every_loss_with_every_other_choice() -> None:
    """No two dimensions go in step, so that none is taken for the other."""
    drawn = [Settings(FULL).spread(index) for index in range(64)]
    for name in ("schedule", "on_policy", "temperature"):
        pairs = Counter((one.loss, getattr(one, name)) for one in drawn)
        assert len(pairs) == 8, name
        assert min(pairs.values()) >= 4, (name, pairs)


def test_only_what_has_a_choice_and_matters_is_a_dimension() -> None:
    settings = Settings(FULL)
    extra = {
        "logits": set(),
        "top_k": {"distil.top_k"},
        "logits+hidden": {"distil.layers", "distil.weight"},
        "reverse_kl+relations+task": {"distil.layers", "distil.weight"},
    }
    for index in range(16):
        drawn = settings.spread(index)
        expected = COMMON | {"distil.schedule", "distil.on_policy"} | extra[drawn.loss]
        dimensions, params = settings.distributions(drawn), settings.to_params(drawn)
        assert set(dimensions) == set(params) == expected
        for name, dimension in dimensions.items():
            assert dimension._contains(dimension.to_internal_repr(params[name])), name
    both = settings.distributions(Distillation(1000, 2e-4, 2.0, "logits+hidden"))
    assert both["distil.weight"] == FloatDistribution(0.1, 10, log=True)
    assert both["distil.on_policy"] == CategoricalDistribution([0.0, 0.5])
    one = DistilSection(loss=["logits+hidden"], weight=[0.3], layers=["last"], on_policy=[0.2])
    drawn = Settings(one).spread(3)
    assert (drawn.weight, drawn.layers, drawn.on_policy) == (0.3, "last", 0.2)
    assert set(Settings(one).distributions(drawn)) == COMMON


def test_what_lies_outside_is_not_held() -> None:
    settings = Settings(FULL)
    inside = Distillation(1000, 2e-4, 2.0, "logits+hidden", weight=2.0, layers="last")
    assert settings.holds(inside)
    for other in (
        {"loss": "logits+task"},
        {"weight": 20.0},
        {"schedule": "constant"},
        {"on_policy": 0.25},
    ):
        assert not settings.holds(Distillation(**{**vars(inside), **other})), other
    assert settings.holds(Distillation(1000, 2e-4, 2.0, "logits"))
    assert not Settings(DistilSection(tokens=[1000], schedule=["linear"])).holds(
        Distillation(1000, 2e-4, 2.0, "logits")
    )


def test_equal_trials_are_equal_whatever_was_drawn_for_what_they_do_not_use() -> None:
    section = DistilSection(
        loss=["logits"], weight=[0.1, 1, 10], layers=["last", "each"], top_k=[8, 64], tokens=[100]
    )
    drawn = {Settings(section).spread(index) for index in range(12)}
    assert len(drawn) == 12, "learning rates differ"
    assert all(set(one.to_json()) == {"tokens", "lr", "temperature", "loss"} for one in drawn)
