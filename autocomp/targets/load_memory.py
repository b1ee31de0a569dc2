"""How much memory loading a model takes, from formats alone: what a peak-memory budget counts on.

    peak = idle + Σ over ways of loading of (slope(way) · Σ over sites of bytes(way, format))

`idle` is a process that has the runtime loaded and a small model in it. Constants that are unpacked
when a session opens stay in memory, every intermediate result of them, until all are folded, so the
peak is not that of running and does not follow from the size on disk: 4-bit weights with float
activations take 14 bytes each at the peak, half a byte on disk. Bytes per weight of each way were
fitted on 114 processes that opened one of three models of BERT's layout in one format or a random
mixture (docs/design.md): mean error 1.6%. `idle` and slopes are fitted to what a study measures,
by robust ridge regression towards the figures here. No torch, no runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autocomp.core.unit import SiteFormat
from autocomp.targets.ridge import robust_ridge

Parts = Mapping[str, float]
"""Way of loading → bytes it takes at the peak."""

UNMEASURED_ERROR = 0.15
"""Relative error of a prediction that rests on the dense model's measurement alone."""

_IDLE_DEVIATION = 0.5
"""Expected deviation of `idle`, relative: activations, caches and the machine's libraries."""
_SLOPE_DEVIATION = 0.2
_NOISE = 0.03
"""Relative error of a measured peak."""


@dataclass(frozen=True)
class Loading:
    """What loading takes on one runtime, in bytes per weight by way of loading.

    Ways are named by the recipe, the bits of the weights and whether they are sparse:
    `unpacked 4`, `int8 8 sparse`. One that is not listed takes `packed` times its bytes on disk.
    """

    idle_bytes: float
    per_weight: Mapping[str, float]
    packed: float

    def part(self, format: SiteFormat, recipe: str, size_bytes: int) -> tuple[str, float]:
        """(Way of loading, bytes at the peak) of one site; `size_bytes` is that on disk."""
        way = f"{recipe} {format.weight_bits}" + (" sparse" if format.nonzeros is not None else "")
        rate = self.per_weight.get(way)
        if rate is None:
            return way, self.packed * size_bytes
        return way, rate * format.rows * format.columns


ONNX_RUNTIME = Loading(
    idle_bytes=78e6,
    per_weight={
        "gather 32": 4.3,
        "float 32": 7.0,
        "int8 8": 1.5,
        "int8 4": 5.9,
        "int8 3": 9.0,
        "int8 2": 8.8,
        "unpacked 8": 9.6,
        "unpacked 4": 13.6,
        "unpacked 3": 17.0,
        "unpacked 2": 16.8,
        "float 32 sparse": 19.6,
        "int8 8 sparse": 10.7,
        "int8 4 sparse": 16.8,
        "int8 3 sparse": 20.0,
        "int8 2 sparse": 20.0,
        "unpacked 8 sparse": 19.3,
        "unpacked 4 sparse": 25.0,
        "unpacked 3 sparse": 28.0,
        "unpacked 2 sparse": 28.0,
    },
    packed=1.3,
)
"""Of ONNX Runtime 1.31 on x86. Formats of 3 and 2 bits that were not measured, and sparse ones
below 8 bits with float activations, are sums of what their steps leave in memory."""

OPENVINO = Loading(
    idle_bytes=122e6,
    per_weight={
        "gather 32": 4.0,
        "float 32": 7.5,
        "dynamic 8": 0.9,
        "dynamic 4": 1.8,
        "static 8": 0.9,
        "static 4": 1.8,
        "unpacked 8": 8.3,
        "unpacked 4": 8.1,
    },
    packed=1.1,
)
"""Of OpenVINO 2026.4 on x86, fitted on 22 processes and one model. Its compiler frees what it
unpacked, weight by weight; its libraries are larger."""


@dataclass(frozen=True)
class PeakFit:
    """`idle` and the slope of each way of loading, fitted to measured models.

    Attributes:
        idle_bytes: where the fit starts from, and after `fitted` what it found.
        slopes: way → factor; 1 where nothing was measured.
        error: mean of |predicted / measured − 1|, each model left out of its own fit; before three
            were measured, `UNMEASURED_ERROR`.
    """

    idle_bytes: float
    slopes: Mapping[str, float] = field(default_factory=dict)
    error: float = UNMEASURED_ERROR

    def of(self, parts: Parts) -> float:
        """What the parts add to the peak, in bytes."""
        return sum(self.slopes.get(way, 1.0) * bytes_ for way, bytes_ in parts.items())

    def fitted(self, measured: Sequence[tuple[Parts, float]]) -> PeakFit:
        """A fit to `measured` (parts of a whole model, its peak in bytes), starting from this."""
        if not measured:
            return self
        fit = self._solved(measured)
        if len(measured) < 3:
            return fit
        misses = []
        for index, (parts, peak) in enumerate(measured):
            other = self._solved([*measured[:index], *measured[index + 1 :]])
            misses.append(abs((other.idle_bytes + other.of(parts)) / peak - 1.0))
        return PeakFit(fit.idle_bytes, fit.slopes, max(_NOISE, float(np.mean(misses))))

    def _solved(self, measured: Sequence[tuple[Parts, float]]) -> PeakFit:
        ways = sorted({way for parts, _ in measured for way in parts})
        features = np.array(
            [[1.0, *(parts.get(way, 0.0) for way in ways)] for parts, _ in measured]
        )
        prior = np.array([self.idle_bytes, *(self.slopes.get(way, 1.0) for way in ways)])
        deviation = np.array([_IDLE_DEVIATION * self.idle_bytes, *[_SLOPE_DEVIATION] * len(ways)])
        peaks = np.array([peak for _, peak in measured])
        idle, *slopes = map(float, robust_ridge(features, peaks, prior, deviation, _NOISE))
        found = {way: max(slope, 0.0) for way, slope in zip(ways, slopes, strict=True)}
        return PeakFit(max(idle, 0.0), {**self.slopes, **found}, self.error)
