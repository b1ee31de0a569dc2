"""Problems with known answers: small enough to enumerate, with interactions between units."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.measurement import Measurement
from autocomp.core.unit import Site, Unit
from autocomp.search.scores import Scores
from autocomp.search.space import Space
from autocomp.spec.schema import DistilSection


def ffn(index: int, width: int = 128) -> Unit:
    """A feed-forward unit of a toy model."""
    up = Site(f"blocks.{index}.up", "up", width, 32, True)
    down = Site(f"blocks.{index}.down", "down", 32, width, True)
    return Unit(f"layers.{index}.ffn", "ffn", (up, down), layer=index, width=width, skippable=True)


def attention(index: int, heads: int = 4) -> Unit:
    """An attention unit of a toy model."""
    sites = tuple(
        Site(f"blocks.{index}.{role}", role, 32, 32, True)  # type: ignore[arg-type]
        for role in ("query", "key", "value", "output")
    )
    return Unit(
        f"layers.{index}.attention",
        "attention",
        sites,
        layer=index,
        heads=heads,
        kv_heads=heads,
        head_dim=8,
        skippable=True,
    )


def embeddings() -> Unit:
    """An embedding table of a toy model."""
    site = Site("embeddings.word", "embedding", 1000, 32, False)
    return Unit("embeddings", "embedding", (site,))


LEVELS = (
    Option(),
    Option((Step.of("rtn", weights=8, activations=8),)),
    Option((Step.of("rtn", weights=4, activations=32),)),
    Option((Step.of("width", keep=64), Step.of("rtn", weights=4, activations=32))),
    Option((Step.of("skip"),)),
)


class TablePredictor:
    """A predictor from plain tables; `scale` plays the part of a refitted correction."""

    def __init__(
        self,
        latency: Mapping[str, Mapping[str, float]],
        size: Mapping[str, Mapping[str, float]],
        base_latency_ms: float = 0.0,
        base_size_bytes: float = 0.0,
        scale: float = 1.0,
        peak_base_bytes: float | None = None,
        peak_per_byte: float = 0.0,
    ) -> None:
        self._latency, self._size, self._scale = latency, size, scale
        self.base_peak_memory_bytes = peak_base_bytes
        self._peak_per_byte = peak_per_byte
        self.base_latency_ms = base_latency_ms * scale
        self.base_size_bytes = base_size_bytes

    def latency_ms(self, unit: str, option: Option) -> float:
        return self._latency[unit][option.key] * self._scale

    def size_bytes(self, unit: str, option: Option) -> float:
        return self._size[unit][option.key]

    def peak_memory_bytes(self, unit: str, option: Option) -> float:
        return self._peak_per_byte * self.size_bytes(unit, option)

    def with_peak(self, base_bytes: float, per_byte: float) -> TablePredictor:
        """The same with a peak memory, affine in the size of the units."""
        return type(self)(
            self._latency,
            self._size,
            self.base_latency_ms / self._scale,
            self.base_size_bytes,
            self._scale,
            base_bytes,
            per_byte,
        )

    def predict(self, options: Mapping[str, Option]) -> Measurement:
        return Measurement(
            "estimated",
            self.base_latency_ms + sum(self.latency_ms(u, o) for u, o in options.items()),
            round(self.base_size_bytes + sum(self.size_bytes(u, o) for u, o in options.items())),
        )


@dataclass
class Problem:
    """A space, its costs, and the true KL of each candidate."""

    space: Space
    predictor: TablePredictor
    single: list[np.ndarray]
    pair: np.ndarray
    evaluations: int = 0

    @property
    def scores(self) -> Scores:
        """What replace-one scoring would find: the truth, one unit at a time."""
        return Scores(
            {
                name: {
                    option.key: self.truth(_alone(len(self.space), unit, index))
                    for index, option in enumerate(self.space.options[name])
                }
                for unit, name in enumerate(self.space.names)
            }
        )

    def truth(self, vector: Sequence[int]) -> float:
        """Σ damage plus pairwise interactions of either sign: not additive, not separable."""
        damage = np.array([self.single[unit][level] for unit, level in enumerate(vector)])
        root = np.sqrt(damage)
        return float(damage.sum() + root @ self.pair @ root)

    def evaluate(self, candidates: Sequence[Candidate]) -> list[float]:
        self.evaluations += len(candidates)
        return [self.truth(self.space.encode(candidate)) for candidate in candidates]

    def optimum(self, latency_ms: float, size_bytes: float) -> float:
        """The least true KL within the limits, by enumeration."""
        return self.ranked(latency_ms, size_bytes)[0]

    def ranked(self, latency_ms: float, size_bytes: float) -> np.ndarray:
        """True KL of everything within the limits, sorted."""
        vectors = np.array(list(itertools.product(*(range(n) for n in self.space.levels))))
        damage = np.stack([self.single[u][vectors[:, u]] for u in range(len(self.space))], axis=1)
        root = np.sqrt(damage)
        value = damage.sum(1) + ((root @ self.pair) * root).sum(1)
        table = {
            what: np.sum(
                [
                    np.array(
                        [
                            getattr(self.predictor, what)(name, option)
                            for option in self.space.options[name]
                        ]
                    )[vectors[:, u]]
                    for u, name in enumerate(self.space.names)
                ],
                axis=0,
            )
            for what in ("latency_ms", "size_bytes")
        }
        latency = table["latency_ms"] + self.predictor.base_latency_ms
        size = table["size_bytes"] + self.predictor.base_size_bytes
        return np.sort(value[(latency <= latency_ms) & (size <= size_bytes)])


def _alone(units: int, unit: int, level: int) -> list[int]:
    vector = [0] * units
    vector[unit] = level
    return vector


def problem(units: int = 7, seed: int = 0, distill: DistilSection | None = None) -> Problem:
    """Feed-forward units with five levels each; dense costs about 1 ms and 100 kB a unit."""
    rng = np.random.default_rng(seed)
    members = [ffn(i) for i in range(units)]
    space = Space(members, {unit.name: LEVELS for unit in members}, distill)
    latency = np.array([1.0, 0.5, 0.95, 0.6, 0.0]) * rng.uniform(0.8, 1.2, (units, 1))
    size = np.array([100e3, 26e3, 14e3, 8e3, 0.0]) * rng.uniform(0.8, 1.2, (units, 1))
    damage = np.array([0.0, 0.02, 0.15, 0.5, 1.0]) * rng.lognormal(0.0, 0.8, (units, 5))
    pair = np.triu(rng.uniform(-0.2, 3.0, (units, units)) * (rng.random((units, units)) < 0.5), 1)
    keys = [option.key for option in LEVELS]
    return Problem(
        space,
        TablePredictor(
            {m.name: dict(zip(keys, latency[u], strict=True)) for u, m in enumerate(members)},
            {m.name: dict(zip(keys, size[u], strict=True)) for u, m in enumerate(members)},
            base_latency_ms=0.3,
            base_size_bytes=20e3,
        ),
        list(damage),
        pair,
    )
