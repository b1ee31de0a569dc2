"""Distillation settings of a trial: spread at first, later near the best trial so far."""

from __future__ import annotations

import math

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from autocomp.core.candidate import Distillation
from autocomp.spec.schema import DistilSection


class Settings:
    """Draws distillation settings from a spec's ranges.

    Args:
        ranges: the spec's `distill` section.
    """

    def __init__(self, ranges: DistilSection) -> None:
        self._ranges = ranges
        self._temperatures = sorted(set(ranges.temperature))
        self._most = max(ranges.tokens)

    def spread(self, index: int) -> Distillation:
        """The `index`-th of a sequence that covers the ranges evenly, from their middle.

        Most tokens always: architectures are compared at one fidelity.
        """
        order = sorted(self._temperatures, key=lambda value: abs(value - 2.0))
        return self._make(
            self._lr(_van_der_corput(index + 1)),
            order[index % len(order)],
            self._most,
            self._ranges.loss[index % len(self._ranges.loss)],
        )

    def near(self, best: Distillation, rng: np.random.Generator) -> Distillation:
        """Settings near the best trial's: same loss, learning rate times a log-normal factor.

        The temperature moves to a neighbour three times in ten; fewer tokens than the most are
        tried once in five.
        """
        low, high = self._ranges.lr.low, self._ranges.lr.high
        factor = math.exp(rng.normal(0.0, 0.25 * math.log(high / low)))
        at = self._temperatures.index(best.temperature)
        if rng.random() < 0.3:
            at = min(max(at + int(rng.choice([-1, 1])), 0), len(self._temperatures) - 1)
        tokens = int(rng.choice(self._ranges.tokens)) if rng.random() < 0.2 else self._most
        lr = min(max(best.lr * factor, low), high)
        return self._make(lr, self._temperatures[at], tokens, best.loss)

    def holds(self, settings: Distillation) -> bool:
        """Whether settings lie within the ranges; those of a baseline may not."""
        ranges = self._ranges
        return settings.tokens in ranges.tokens and (
            settings.tokens == 0
            or (
                settings.loss in ranges.loss
                and settings.temperature in ranges.temperature
                and ranges.lr.low <= settings.lr <= ranges.lr.high
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
            dimensions["distil.loss"] = CategoricalDistribution(list(self._ranges.loss))
        return dimensions

    def to_params(self, settings: Distillation) -> dict[str, float | int | str]:
        """The parameters of `distributions`."""
        values: dict[str, float | int | str] = {"distil.tokens": settings.tokens}
        if settings.tokens:
            values["distil.lr"] = settings.lr
            values["distil.temperature"] = settings.temperature
            values["distil.loss"] = settings.loss
        return values

    def _lr(self, share: float) -> float:
        lr = self._ranges.lr
        if lr.log:
            return float(lr.low * (lr.high / lr.low) ** share)
        return lr.low + (lr.high - lr.low) * share

    def _make(self, lr: float, temperature: float, tokens: int, loss: str) -> Distillation:
        if tokens == 0:
            return Distillation()
        ranges = self._ranges.lr
        rounded = min(max(float(f"{lr:.3g}"), ranges.low), ranges.high)
        return Distillation(tokens=tokens, lr=rounded, temperature=temperature, loss=loss)


def _van_der_corput(index: int) -> float:
    """1 → 1/2, 2 → 1/4, 3 → 3/4, 4 → 1/8 …: evenly spread however far it is taken."""
    value, share = 0.0, 0.5
    while index:
        value += share * (index & 1)
        index >>= 1
        share /= 2
    return value
