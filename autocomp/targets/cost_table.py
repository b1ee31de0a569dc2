"""The cost table: what each option of each unit costs on a target, and so what a candidate costs.

    latency = base + Σ over units of (slope(kernels) · isolated(unit, option) + step)
    size    = rest + Σ over units of bytes(unit, option)

`isolated` is a sublayer timed alone, among others; a skipped unit adds nothing at all. `base`,
`step` and a slope per class of kernels (float, int8, …) are fitted on whole candidates by robust
ridge regression towards base as measured, slopes 1 and step 0: a dozen candidates suffice and a
refit with later measurements only sharpens it. Bytes follow from the formats and need no fit.
Where options shorten the sequence (`tokens`), a unit counts as measured at the length it then sees
and the shortening itself as a part of its own; units are walked in model order.
Loading and predicting need neither torch nor a runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.core.errors import InternalError
from autocomp.core.files import write_text_atomic
from autocomp.core.measurement import Measurement
from autocomp.targets.ridge import robust_ridge
from autocomp.targets.token_costs import KERNELS, TokenCosts

Choice = Mapping[str, str]
"""Unit name → option key."""

_SLOPE_DEVIATION = 0.2
"""Expected deviation of a slope from 1."""
_STEP_DEVIATION = 0.04
"""Expected deviation of the step from 0, as a fraction of the mean isolated latency."""
_BASE_DEVIATION = 0.3
"""Expected deviation of the base, relative."""
_NOISE = 0.02
"""Relative error of a measured latency; what misses by more than thrice that counts less."""


@dataclass(frozen=True)
class Entry:
    """One option at one unit, alone.

    Attributes:
        latency_ms: the sublayer in isolation; 0 when skipped.
        size_bytes: of its weights on disk.
        kernels: class of the kernels that dominate it; empty when skipped.
    """

    latency_ms: float
    size_bytes: int
    kernels: str


@dataclass(frozen=True)
class Fit:
    """The correction from isolated to whole; a slope per class of kernels."""

    base_ms: float
    step_ms: float
    slopes: Mapping[str, float]


@dataclass
class CostTable:
    """Costs of a model's units on one target at one workload.

    Attributes:
        device: fingerprint of the target; a table holds for no other.
        workload: what was measured, for reports.
        entries: unit → option key → entry.
        base_ms: the model with every unit as small as it gets taken out, measured or estimated.
        rest_bytes: bytes on disk of everything outside the units.
        pairs: whole candidates measured so far, with their latencies: what the fit rests on.
        ties: unit → the unit whose bytes it shares while both have the option keys given.
        tokens: costs by sequence length, where options shorten it. `entries` is in model order.
    """

    device: str
    workload: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Entry]]
    base_ms: float
    rest_bytes: int
    ties: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    pairs: list[tuple[dict[str, str], float]] = field(default_factory=list)
    correction: Fit | None = None
    tokens: TokenCosts | None = None

    def __post_init__(self) -> None:
        self._savings: dict[tuple[str, int], float] = {}
        if self.correction is None:
            self.fit([])

    def predict(self, choice: Choice) -> Measurement:
        """Cost of a candidate.

        Raises:
            InternalError: for a unit or option the table does not hold.
        """
        latency = self.fitted.base_ms
        size = self.rest_bytes
        for unit in self.entries:
            if unit not in choice:
                raise InternalError(f"no option given for unit {unit!r}")
            size += self.entry(unit, choice[unit]).size_bytes
        for kernels, isolated in self._parts(choice):
            latency += self._corrected(kernels, isolated)
        for unit, (owner, own_key, owner_key) in self.ties.items():
            if choice[unit] == own_key and choice[owner] == owner_key:
                size -= self.entry(unit, own_key).size_bytes
        return Measurement("estimated", latency, size, device=self.device)

    def latency_ms(self, unit: str, key: str) -> float:
        """What this option adds to a whole model's latency.

        `predict` is `base` plus these unless options shorten the sequence. Then a unit counts as
        if nothing before it did, and an option that shortens it is credited with what that alone
        saves on the units behind, on average over their options: the sum is a first-order estimate.
        """
        entry = self.entry(unit, key)
        own = self._corrected(entry.kernels, entry.latency_ms) if entry.kernels else 0.0
        reduction = None if self.tokens is None else self.tokens.reduction(unit, key)
        if self.tokens is None or reduction is None:
            return own
        dense = self.tokens.dense
        own += self._corrected(KERNELS, self.tokens.own_ms(reduction, dense))
        behind = list(self.entries)[list(self.entries).index(unit) + 1 :]
        return own - sum(self._typical_saving(name, reduction.kept(dense)) for name in behind)

    def _typical_saving(self, unit: str, tokens: int) -> float:
        """What a unit saves when it sees `tokens` instead of all, on average over its options."""
        known = self._savings.get((unit, tokens))
        if known is None:
            known = float(
                np.mean(
                    [
                        self._corrected(entry.kernels, entry.latency_ms)
                        - self._corrected(entry.kernels, self._isolated(unit, key, tokens))
                        if entry.kernels
                        else 0.0
                        for key, entry in self.entries[unit].items()
                    ]
                )
            )
            self._savings[unit, tokens] = known
        return known

    def _isolated(self, unit: str, key: str, tokens: int | None) -> float:
        """The unit alone where `tokens` arrive."""
        if self.tokens is None or tokens is None:
            return self.entry(unit, key).latency_ms
        found = self.tokens.latency_ms(unit, key, tokens)
        return self.entry(unit, key).latency_ms if found is None else found

    def _corrected(self, kernels: str, isolated: float) -> float:
        """What a part adds to a whole model; the step is for units."""
        step = 0.0 if kernels == KERNELS else self.fitted.step_ms
        return max(0.0, self.fitted.slopes[kernels] * isolated + step)

    def _parts(self, choice: Choice) -> Iterator[tuple[str, float]]:
        """(class of kernels, isolated latency in ms) of every unit and reduction present."""
        tokens = None if self.tokens is None else self.tokens.dense
        for unit in self.entries:
            key = choice[unit]
            entry = self.entry(unit, key)
            if entry.kernels:
                yield entry.kernels, self._isolated(unit, key, tokens)
            if self.tokens is not None and tokens is not None:
                reduction = self.tokens.reduction(unit, key)
                if reduction is not None:
                    yield KERNELS, self.tokens.own_ms(reduction, tokens)
                    tokens = reduction.kept(tokens)

    def entry(self, unit: str, key: str) -> Entry:
        """The isolated entry. Raises InternalError if the table does not hold it."""
        try:
            return self.entries[unit][key]
        except KeyError:
            raise InternalError(
                f"the cost table holds no option {key!r} of unit {unit!r}: profile it again"
            ) from None

    @property
    def fitted(self) -> Fit:
        """The correction in use."""
        assert self.correction is not None
        return self.correction

    def fit(self, pairs: Sequence[tuple[Choice, float]]) -> None:
        """Add measured whole candidates (choice, latency in ms) and fit the correction to all.

        What was added before is not added again.
        """
        given = [(dict(choice), float(latency)) for choice, latency in pairs]
        self.pairs += [pair for pair in given if pair not in self.pairs]
        present = [e for options in self.entries.values() for e in options.values() if e.kernels]
        classes = sorted({entry.kernels for entry in present})
        if self.tokens is not None:
            classes.append(KERNELS)
        typical = float(np.mean([entry.latency_ms for entry in present])) if present else 1.0
        prior = np.array([self.base_ms, 0.0, *[1.0] * len(classes)])
        deviation = np.array(
            [
                max(_BASE_DEVIATION * self.base_ms, 1e-9),
                max(_STEP_DEVIATION * typical, 1e-9),
                *[_SLOPE_DEVIATION] * len(classes),
            ]
        )
        features = np.array([self._features(choice, classes) for choice, _ in self.pairs])
        features = features.reshape(-1, len(prior))
        latencies = np.array([latency for _, latency in self.pairs])
        solution = robust_ridge(features, latencies, prior, deviation, _NOISE)
        base, step, *slopes = map(float, solution)
        self._savings.clear()
        self.correction = Fit(max(base, 0.0), step, dict(zip(classes, slopes, strict=True)))

    def error(self) -> float | None:
        """Mean of |predicted / measured − 1| of whole candidates, each left out of its own fit.

        `None` with fewer than three of them.
        """
        if len(self.pairs) < 3:
            return None
        misses = []
        for index, (choice, latency_ms) in enumerate(self.pairs):
            others = replace(self, pairs=[], correction=None)
            others.fit([*self.pairs[:index], *self.pairs[index + 1 :]])
            predicted = others.predict(choice).latency_ms
            assert predicted is not None
            misses.append(abs(predicted / latency_ms - 1))
        return float(np.mean(misses))

    def with_pairs(self, pairs: Sequence[tuple[Choice, float]]) -> CostTable:
        """A copy whose correction is fitted to these measured candidates too."""
        copy = replace(self, pairs=list(self.pairs), correction=None)
        copy.fit(pairs)
        return copy

    def _features(self, choice: Choice, classes: Sequence[str]) -> list[float]:
        """1, number of units present, isolated latency per class of kernels."""
        totals = dict.fromkeys(classes, 0.0)
        count = 0
        for kernels, isolated in self._parts(choice):
            totals[kernels] += isolated
            count += kernels != KERNELS
        return [1.0, float(count), *totals.values()]

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        data = asdict(self)
        data["version"] = 1
        if self.tokens is None:
            data.pop("tokens")
        write_text_atomic(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Inverse of `save`."""
        data = json.loads(path.read_text(encoding="utf-8"))
        data.pop("version")
        data["entries"] = {
            unit: {key: Entry(**entry) for key, entry in options.items()}
            for unit, options in data["entries"].items()
        }
        data["ties"] = {unit: tuple(tie) for unit, tie in data["ties"].items()}
        data["pairs"] = [(choice, latency) for choice, latency in data["pairs"]]
        data["correction"] = Fit(**data["correction"])
        if "tokens" in data:
            data["tokens"] = TokenCosts.from_json(data["tokens"])
        return cls(**data)
