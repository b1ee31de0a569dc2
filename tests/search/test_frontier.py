"""Proposals for the front: the quality model against numpy, the choice against brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from search_problems import problem

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate
from autocomp.core.measurement import Measurement
from autocomp.front.dominance import hypervolume
from autocomp.search.architectures import Architectures
from autocomp.search.costs import SHARES, Costs
from autocomp.search.frontier import Frontier, QualityModel
from autocomp.search.proposer import TrialProposer
from autocomp.search.screening import screen
from autocomp.search.space import Vector
from autocomp.study.records import TrialRecord

BUDGET = Budget(latency_ms=3.0, size_bytes=150e3)


def test_quality_falls_with_the_logarithm_of_the_divergence() -> None:
    kl = [0.1, 0.2, 0.4, 0.8]
    exact = [0.9 - 0.05 * math.log(value) for value in kl]
    model = QualityModel.fit(list(zip(np.log(kl), exact, strict=True)))
    assert model.slope == pytest.approx(0.05)
    assert model.predict(math.log(1.6)) == pytest.approx(0.9 - 0.05 * math.log(1.6))
    assert model.predict(math.log(0.001)) == max(exact), "nothing is expected above the best seen"


@pytest.mark.parametrize(
    "measured", [[(0.3, 0.8)], [(0.3, 0.8), (0.3, 0.6)], [(0.1, 0.7), (0.9, 0.8)]]
)
def test_without_a_falling_trend_all_are_expected_alike(
    measured: list[tuple[float, float]],
) -> None:
    model = QualityModel.fit([(math.log(kl), quality) for kl, quality in measured])
    assert model.predict(-4.0) == pytest.approx(model.predict(2.0))
    assert model.predict(0.0) == pytest.approx(np.mean([quality for _, quality in measured]))


def _setup() -> tuple:
    p = problem(seed=3)
    found = screen(p.space, p.predictor, p.evaluate, BUDGET, 60, 0, scores=p.scores)
    costs = Costs(p.space, p.predictor)

    def record(id: str, kind: str, candidate: Candidate) -> TrialRecord:
        vector = p.space.encode(candidate)
        measured = Measurement(
            "measured", costs.total("latency_ms", vector), costs.total("size_bytes", vector)
        )
        quality = math.exp(-p.truth(vector))
        return TrialRecord(
            id, kind, "milp", "complete", candidate, quality=quality, measured=measured
        )

    dense = p.space.decode((0,) * len(p.space.names))
    records = [record("dense", "dense", dense)]
    records += [record(f"t{i}", "search", found[i].candidate) for i in range(4)]
    return p, found, costs, records


def test_it_takes_what_adds_most_by_brute_force() -> None:
    p, found, costs, records = _setup()
    architectures = Architectures(p.space, found, p.scores)
    tried = {p.space.encode(r.candidate) for r in records}
    limits = {None: costs.limits(BUDGET)}
    objectives = ("quality", "latency", "size")
    frontier = Frontier(p.space, architectures, objectives)

    def expected(vectors: Sequence[Vector]) -> np.ndarray:
        """Otherwise ordered than the screening KL is."""
        return np.array([math.log(architectures.kl(v)) - 0.3 * v.count(2) for v in vectors])

    chosen = frontier.most_gain(
        records, {None: costs}, limits, tried, np.random.default_rng(0), expected
    )
    assert chosen is not None
    rng = np.random.default_rng(0)
    pool = architectures.below(costs, limits[None], SHARES, tried, rng, expected)
    model = QualityModel.fit(
        [(expected([p.space.encode(r.candidate)])[0], r.quality) for r in records[1:]]
    )
    dense = records[0].measured

    def point(quality: float, latency_ms: float, size_bytes: float) -> list[float]:
        return [-quality, latency_ms / dense.latency_ms, size_bytes / dense.size_bytes]

    points = [point(r.quality, r.measured.latency_ms, r.measured.size_bytes) for r in records]
    volumes = {
        vector: hypervolume(
            [
                *points,
                point(
                    model.predict(expected([vector])[0]),
                    costs.total("latency_ms", vector),
                    costs.total("size_bytes", vector),
                ),
            ],
            [0.0, 1.0, 1.0],
        )
        for vector in pool
    }
    assert chosen == (None, max(volumes, key=volumes.__getitem__))
    assert volumes[chosen[1]] > hypervolume(points, [0.0, 1.0, 1.0])
    assert costs.share(chosen[1], limits[None]) <= SHARES[0]


def test_nothing_is_chosen_before_dense_and_a_trial_are_measured() -> None:
    p, found, costs, records = _setup()
    frontier = Frontier(p.space, Architectures(p.space, found, p.scores), ("quality", "latency"))
    for known in ([], records[:1], records[1:]):
        limits = {None: costs.limits(BUDGET)}
        rng = np.random.default_rng(0)
        assert (
            frontier.most_gain(known, {None: costs}, limits, set(), rng, lambda v: np.zeros(len(v)))
            is None
        )


def test_a_search_proposes_for_the_front_and_says_so() -> None:
    p, found, costs, records = _setup()
    proposer = TrialProposer(
        p.space,
        found,
        {None: p.predictor},
        BUDGET,
        scores=p.scores,
        trials=16,
        finished=records,
    )
    shares = {}
    while (proposal := proposer.ask()) is not None:
        vector = p.space.encode(proposal.candidate)
        shares.setdefault(proposal.proposed_by, []).append(
            costs.share(vector, costs.limits(BUDGET))
        )
        measured = Measurement(
            "measured", costs.total("latency_ms", vector), costs.total("size_bytes", vector)
        )
        proposer.tell(
            proposal.id,
            TrialRecord(
                proposal.id,
                "search",
                proposal.proposed_by,
                "complete",
                proposal.candidate,
                quality=math.exp(-p.truth(vector)),
                measured=measured,
            ),
        )
    assert max(shares["front"]) <= SHARES[0]
    assert max(max(values) for name, values in shares.items() if name != "front") > 0.9
