"""What the length of the sequence does to costs: measured at a few lengths, linear in between.

A unit costs what it costs at the length it sees, which follows from the reductions of the units
before it; a reduction itself costs something too. Neither torch nor a runtime is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocomp.core.tokens import TokenReduction

Curve = Sequence[float]
"""Latencies in ms at `TokenCosts.lengths`."""

KERNELS = "tokens"
"""Class of kernels of the reductions themselves."""


@dataclass(frozen=True)
class TokenCosts:
    """Latencies of units and of reductions by sequence length.

    Attributes:
        lengths: tokens per example measured at, ascending; the last is the dense model's.
        curves: unit → option key → the unit alone at these lengths; what is not there costs the
            same at every length.
        reductions: unit → option key → what the option does to the sequence behind the unit.
        own: `reduction_key` → the reduction alone, where that many tokens arrive.
    """

    lengths: tuple[int, ...]
    curves: Mapping[str, Mapping[str, Curve]]
    reductions: Mapping[str, Mapping[str, TokenReduction]]
    own: Mapping[str, Curve]

    @property
    def dense(self) -> int:
        """Tokens per example of the dense model."""
        return self.lengths[-1]

    def reduction(self, unit: str, key: str) -> TokenReduction | None:
        """What an option does to the sequence behind its unit."""
        return self.reductions.get(unit, {}).get(key)

    def latency_ms(self, unit: str, key: str, tokens: int) -> float | None:
        """The unit alone where `tokens` arrive; `None` if the length does not matter to it."""
        curve = self.curves.get(unit, {}).get(key)
        return None if curve is None else self._at(curve, tokens)

    def own_ms(self, reduction: TokenReduction, tokens: int) -> float:
        """The reduction itself where `tokens` arrive."""
        if not reduction.removed(tokens):
            return 0.0
        return self._at(self.own[reduction_key(reduction)], tokens)

    def _at(self, curve: Curve, tokens: int) -> float:
        return float(np.interp(tokens, self.lengths, curve))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenCosts:
        """Inverse of `dataclasses.asdict`, through JSON."""
        return cls(
            lengths=tuple(data["lengths"]),
            curves={
                unit: {key: tuple(curve) for key, curve in options.items()}
                for unit, options in data["curves"].items()
            },
            reductions={
                unit: {key: TokenReduction(**one) for key, one in options.items()}
                for unit, options in data["reductions"].items()
            },
            own={key: tuple(curve) for key, curve in data["own"].items()},
        )


def reduction_key(reduction: TokenReduction) -> str:
    """Equal for reductions that cost the same: `tome 0.1 1`."""
    return f"{reduction.method} {reduction.ratio:g} {reduction.protected}"


def measured_lengths(
    reductions: Mapping[str, Mapping[str, TokenReduction]], tokens: int
) -> tuple[int, ...]:
    """The lengths to measure at: the shortest a candidate can reach, the dense one, the middle.

    `reductions` is in model order. Ascending; one length if no option removes a token.
    """
    shortest = tokens
    for options in reductions.values():
        shortest = min((one.kept(shortest) for one in options.values()), default=shortest)
    return tuple(sorted({shortest, (shortest + tokens) // 2, tokens}))
