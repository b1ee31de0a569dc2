"""The cost table: what each option of each unit costs on a target, and so what a candidate costs.

    latency = base + Σ over units of (slope(kind) · isolated(unit, option) + step(kind))
    size    = rest + Σ over units of bytes(unit, option)

`isolated` is a sublayer timed alone; a skipped unit adds nothing at all. `base`, `slope` and `step`
are fitted on whole candidates by ridge regression towards base as measured, slope 1 and step 0, so
that a dozen candidates suffice and a refit with later measurements only sharpens it. Bytes follow
from the formats and need no fit. Loading and predicting need neither torch nor a runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.core.errors import InternalError
from autocomp.core.files import write_text_atomic
from autocomp.core.measurement import Measurement

Choice = Mapping[str, str]
"""Unit name → option key."""

_SLOPE_PRIOR = 0.1
"""Expected deviation of a slope from 1."""
_STEP_PRIOR = 0.02
"""Expected deviation of a step from 0, as a fraction of the mean isolated latency of its kind."""
_NOISE = 0.02
"""Relative error of a measured latency."""


@dataclass(frozen=True)
class Entry:
    """One option at one unit, alone.

    Attributes:
        latency_ms: the sublayer in isolation; 0 when skipped.
        size_bytes: of its weights on disk.
        skipped: whether the unit is gone, which takes its step away too.
    """

    latency_ms: float
    size_bytes: int
    skipped: bool = False


@dataclass(frozen=True)
class Fit:
    """The correction from isolated to whole. Kinds are those of units."""

    base_ms: float
    slopes: Mapping[str, float]
    steps: Mapping[str, float]


@dataclass
class CostTable:
    """Costs of a model's units on one target at one workload.

    Attributes:
        device: fingerprint of the target; a table holds for no other.
        workload: what was measured, for reports.
        kinds: unit → kind.
        entries: unit → option key → entry.
        base_ms: the model with every unit as small as it gets taken out, measured or estimated.
        rest_bytes: bytes on disk of everything outside the units.
        pairs: whole candidates measured so far, with their latencies: what the fit rests on.
        ties: unit → the unit whose bytes it shares while both have the option keys given.
    """

    device: str
    workload: Mapping[str, Any]
    kinds: Mapping[str, str]
    entries: Mapping[str, Mapping[str, Entry]]
    base_ms: float
    rest_bytes: int
    ties: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    pairs: list[tuple[dict[str, str], float]] = field(default_factory=list)
    correction: Fit | None = None

    def __post_init__(self) -> None:
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
            latency += self.latency_ms(unit, choice[unit])
            size += self.entry(unit, choice[unit]).size_bytes
        for unit, (owner, own_key, owner_key) in self.ties.items():
            if choice[unit] == own_key and choice[owner] == owner_key:
                size -= self.entry(unit, own_key).size_bytes
        return Measurement("estimated", latency, size, device=self.device)

    def latency_ms(self, unit: str, key: str) -> float:
        """What this option adds to a whole model's latency; `predict` is `base` plus these."""
        entry, kind = self.entry(unit, key), self.kinds[unit]
        if entry.skipped:
            return 0.0
        return max(0.0, self.fitted.slopes[kind] * entry.latency_ms + self.fitted.steps[kind])

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
        """Add measured whole candidates (choice, latency in ms) and fit the correction to all."""
        self.pairs += [(dict(choice), float(latency)) for choice, latency in pairs]
        kinds = sorted(set(self.kinds.values()))
        scale = {kind: self._mean_latency(kind) for kind in kinds}
        prior = np.concatenate([[self.base_ms], np.ones(len(kinds)), np.zeros(len(kinds))])
        deviation = np.concatenate(
            [
                [max(0.2 * self.base_ms, 1e-6)],
                np.full(len(kinds), _SLOPE_PRIOR),
                [max(_STEP_PRIOR * scale[kind], 1e-9) for kind in kinds],
            ]
        )
        rows = [self._features(choice, kinds) for choice, _ in self.pairs]
        weights = [1.0 / (_NOISE * max(latency, 1e-9)) for _, latency in self.pairs]
        design = np.vstack(
            [np.array(row) * w for row, w in zip(rows, weights, strict=True)] or [0 * prior]
        )
        values = np.array(
            [lat * w for (_, lat), w in zip(self.pairs, weights, strict=True)] or [0.0]
        )
        solution, *_ = np.linalg.lstsq(
            np.vstack([design, np.diag(1.0 / deviation)]),
            np.concatenate([values, prior / deviation]),
            rcond=None,
        )
        count = len(kinds)
        self.correction = Fit(
            base_ms=float(max(solution[0], 0.0)),
            slopes=dict(zip(kinds, map(float, solution[1 : 1 + count]), strict=True)),
            steps=dict(zip(kinds, map(float, solution[1 + count :]), strict=True)),
        )

    def with_pairs(self, pairs: Sequence[tuple[Choice, float]]) -> CostTable:
        """A copy whose correction is fitted to these measured candidates too."""
        copy = replace(self, pairs=list(self.pairs), correction=None)
        copy.fit(pairs)
        return copy

    def _mean_latency(self, kind: str) -> float:
        found = [
            entry.latency_ms
            for unit, options in self.entries.items()
            if self.kinds[unit] == kind
            for entry in options.values()
            if not entry.skipped
        ]
        return float(np.mean(found)) if found else 0.0

    def _features(self, choice: Choice, kinds: Sequence[str]) -> list[float]:
        total = dict.fromkeys(kinds, 0.0)
        count = dict.fromkeys(kinds, 0.0)
        for unit in self.entries:
            entry = self.entry(unit, choice[unit])
            total[self.kinds[unit]] += entry.latency_ms
            count[self.kinds[unit]] += not entry.skipped
        return [1.0, *total.values(), *count.values()]

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        data = asdict(self)
        data["version"] = 1
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
        return cls(**data)
