"""Distillation settings of a trial: spread at first, later near the best trial so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from autocomp.core.candidate import Distillation
from autocomp.distill.losses import LOSSES
from autocomp.spec.schema import DistilSection, FloatRange

_MOVES = 0.3
"""How often a setting chosen from a list moves to a neighbour."""

_CHOSEN = ("loss", "weight", "schedule", "layers", "top_k", "on_policy")
"""Settings that are dimensions only where the spec leaves a choice, beside tokens, learning rate
and temperature; the order is that in which they are drawn."""
_PRIMES = (2, 3, 5, 7, 11, 13)


class Settings:
    """Draws distillation settings from a spec's ranges.

    What makes no difference has its default: the weight of a single loss, layers where no loss
    compares any. Trials that train alike are then the same trial.

    Args:
        ranges: the spec's `distill` section.
    """

    def __init__(self, ranges: DistilSection) -> None:
        self._ranges = ranges
        self._temperatures = sorted(set(ranges.temperature))
        self._most = max(ranges.tokens)
        self._chosen: dict[str, Any] = {}
        for name in _CHOSEN:
            given = getattr(ranges, name)
            ordered = name in ("weight", "top_k", "on_policy")
            if isinstance(given, FloatRange):
                self._chosen[name] = given if given.low < given.high else [given.low]
            else:
                values = list(dict.fromkeys(given))
                self._chosen[name] = sorted(values) if ordered else values

    def spread(self, index: int) -> Distillation:
        """The `index`-th of a sequence that covers the ranges evenly, from their middle.

        Most tokens always: architectures are compared at one fidelity.
        """
        order = sorted(self._temperatures, key=lambda value: abs(value - 2.0))
        chosen = {
            name: _listed_or_within(choice, _share(index, dimension))
            for dimension, (name, choice) in enumerate(self._chosen.items())
        }
        return self._make(
            _within_range(self._ranges.lr, _van_der_corput(index + 1)),
            order[index % len(order)],
            self._most,
            chosen,
        )

    def near(self, best: Distillation, rng: np.random.Generator) -> Distillation:
        """Settings near the best trial's: learning rate and weight times log-normal factors.

        What is chosen from a list moves to a neighbour three times in ten; fewer tokens than the
        most are tried once in five.
        """
        lr = _nudged(self._ranges.lr, best.lr, rng)
        at = self._temperatures.index(best.temperature)
        if rng.random() < _MOVES:
            at = min(max(at + int(rng.choice([-1, 1])), 0), len(self._temperatures) - 1)
        tokens = int(rng.choice(self._ranges.tokens)) if rng.random() < 0.2 else self._most
        chosen = {
            name: _moved(choice, getattr(best, name), rng) for name, choice in self._chosen.items()
        }
        return self._make(lr, self._temperatures[at], tokens, chosen)

    def holds(self, settings: Distillation) -> bool:
        """Whether settings lie within the ranges; those of a baseline may not."""
        ranges = self._ranges
        return settings.tokens in ranges.tokens and (
            settings.tokens == 0
            or (
                settings.temperature in ranges.temperature
                and ranges.lr.low <= settings.lr <= ranges.lr.high
                and settings.loss in ranges.loss
                and all(
                    _within(self._chosen[name], getattr(settings, name))
                    for name in _relevant(settings.losses)
                )
            )
        )

    def distributions(self, settings: Distillation) -> dict[str, BaseDistribution]:
        """The study's dimensions that these settings have; tokens alone when untrained."""
        dimensions: dict[str, BaseDistribution] = {
            "distil.tokens": CategoricalDistribution(sorted(set(self._ranges.tokens)))
        }
        if settings.tokens:
            lr = self._ranges.lr
            dimensions["distil.lr"] = FloatDistribution(lr.low, lr.high, log=lr.log)
            dimensions["distil.temperature"] = CategoricalDistribution(self._temperatures)
            dimensions["distil.loss"] = CategoricalDistribution(self._chosen["loss"])
            for name in self._choices(settings):
                choice = self._chosen[name]
                dimensions[f"distil.{name}"] = (
                    FloatDistribution(choice.low, choice.high, log=choice.log)
                    if isinstance(choice, FloatRange)
                    else CategoricalDistribution(choice)
                )
        return dimensions

    def to_params(self, settings: Distillation) -> dict[str, float | int | str]:
        """The parameters of `distributions`."""
        names = ["tokens"]
        if settings.tokens:
            names += ["lr", "temperature", "loss", *self._choices(settings)]
        return {f"distil.{name}": getattr(settings, name) for name in names}

    def _choices(self, settings: Distillation) -> list[str]:
        """Settings that make a difference to these losses and have more than one value."""
        return [
            name
            for name in _relevant(settings.losses)
            if isinstance(self._chosen[name], FloatRange) or len(self._chosen[name]) > 1
        ]

    def _make(
        self, lr: float, temperature: float, tokens: int, chosen: dict[str, Any]
    ) -> Distillation:
        if tokens == 0:
            return Distillation()
        loss = chosen["loss"]
        kept = {name: chosen[name] for name in _relevant(loss.split("+"))}
        if isinstance(self._ranges.weight, FloatRange) and "weight" in kept:
            kept["weight"] = _rounded(self._ranges.weight, kept["weight"])
        return Distillation(
            tokens=tokens,
            lr=_rounded(self._ranges.lr, lr),
            temperature=temperature,
            loss=loss,
            **kept,
        )


def _relevant(losses: Sequence[str]) -> list[str]:
    """Which of the chosen settings, the losses aside, make a difference to a sum of losses."""
    used = {name for loss in losses for name in LOSSES.get(loss).uses}
    used |= {"schedule", "on_policy"}
    if len(losses) > 1:
        used.add("weight")
    return [name for name in _CHOSEN if name in used]


def _within(choice: Any, value: Any) -> bool:
    if isinstance(choice, FloatRange):
        return bool(choice.low <= value <= choice.high)
    return value in choice


def _within_range(range: FloatRange, share: float) -> float:
    """The value at a share in [0, 1] of a range."""
    if range.log:
        return float(range.low * (range.high / range.low) ** share)
    return range.low + (range.high - range.low) * share


def _listed_or_within(choice: Any, share: float) -> Any:
    """The value at a share in [0, 1): a list from its first entry on, a range from its middle."""
    if isinstance(choice, FloatRange):
        return _within_range(choice, (0.5 + share) % 1.0)
    return choice[int(share * len(choice))]


def _nudged(range: FloatRange, value: float, rng: np.random.Generator) -> float:
    factor = math.exp(rng.normal(0.0, 0.25 * math.log(range.high / range.low)))
    return min(max(value * factor, range.low), range.high)


def _moved(choice: Any, value: Any, rng: np.random.Generator) -> Any:
    """A value near this one; the generator is not touched where there is no choice."""
    if isinstance(choice, FloatRange):
        return _nudged(choice, value, rng)
    if len(choice) == 1:
        return choice[0]
    if value not in choice:  # it made no difference before
        return choice[int(rng.integers(len(choice)))]
    if rng.random() >= _MOVES:
        return value
    at = choice.index(value) + int(rng.choice([-1, 1]))
    return choice[min(max(at, 0), len(choice) - 1)]


def _rounded(range: FloatRange, value: float) -> float:
    return min(max(float(f"{value:.3g}"), range.low), range.high)


def _van_der_corput(index: int) -> float:
    """1 → 1/2, 2 → 1/4, 3 → 3/4, 4 → 1/8 …: evenly spread however far it is taken."""
    value, share = 0.0, 0.5
    while index:
        value += share * (index & 1)
        index >>= 1
        share /= 2
    return value


def _share(index: int, dimension: int) -> float:
    """The `index`-th point in [0, 1) of a dimension, spread evenly over all of them together.

    Multiples of the square roots of primes (Richtmyer's sequence); the first point is 0.
    """
    return float(index * math.sqrt(_PRIMES[dimension]) % 1.0)
