"""`at_most`: whatever the search proposes, no more units of a rule are replaced than it allows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from search_problems import TablePredictor, attention, ffn

from autocomp.core.budget import Budget
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import InfeasibleError
from autocomp.search.costs import Costs
from autocomp.search.milp import check_reachable, seeds, solve
from autocomp.search.proposer import TrialProposer
from autocomp.search.repair import Repair
from autocomp.search.scores import Scores
from autocomp.search.screening import screen
from autocomp.search.space import Cap, Space, Vector

MOST = 2
OFFERED = (
    Option(),
    Option((Step.of("replace", mixer="elu"),)),
    Option((Step.of("replace", mixer="elu"), Step.of("rtn", weights=8, activations=8))),
    Option((Step.of("rtn", weights=8, activations=8),)),
)
LATENCY, SIZE = (4.0, 1.0, 0.6, 2.5), (9.0, 9.0, 3.0, 3.0)
UNITS = [attention(0), ffn(0), attention(1), attention(2), attention(3)]
NAMES = tuple(unit.name for unit in UNITS if unit.kind == "attention")


def space(*caps: Cap) -> Space:
    return Space(UNITS, dict.fromkeys(NAMES, OFFERED), caps=caps)


def capped() -> Space:
    """Two of the last three units, none of the first."""
    return space(Cap(NAMES[1:], "replace", MOST), Cap(NAMES[:1], "replace", 0))


def predictor(bend: float = 0.0) -> TablePredictor:
    spread = dict(zip(NAMES, (1.0, 1.1, 1.2, 1.3), strict=True))
    latency = {
        name: {o.key: by * ms for o, ms in zip(OFFERED, LATENCY, strict=True)}
        for name, by in spread.items()
    }
    size = {name: {o.key: b for o, b in zip(OFFERED, SIZE, strict=True)} for name in NAMES}
    other = {"layers.0.ffn": {Option().key: 1.0}}
    return TablePredictor(latency | other, size | other, 0.5, 2.0)


def scores() -> Scores:
    damage = (0.0, 0.5, 0.55, 0.1)
    table = {
        name: {o.key: (1 + 0.2 * i) * d for o, d in zip(OFFERED, damage, strict=True)}
        for i, name in enumerate(NAMES)
    }
    return Scores(table | {"layers.0.ffn": {Option().key: 0.0}})


def allowed(one: Space, vector: Vector) -> bool:
    options = one.decode(vector).by_unit
    replaced = [name for name in NAMES if options[name].step("replace") is not None]
    return NAMES[0] not in replaced and len(replaced) <= MOST


def every(one: Space) -> list[Vector]:
    return list(itertools.product(*(range(count) for count in one.levels)))


def test_the_size_counts_what_is_allowed() -> None:
    one = capped()
    assert one.size == sum(allowed(one, vector) for vector in every(one)) < space().size
    assert space(Cap(NAMES, "replace", 4)).caps == ()
    assert space(Cap(NAMES, "replace", 4)).size == space().size


def test_fits_is_the_cap_by_brute_force() -> None:
    one = capped()
    costs = Costs(one, predictor())
    assert {v for v in every(one) if costs.fits(v, {})} == {
        v for v in every(one) if allowed(one, v)
    }


@pytest.mark.parametrize("latency", [14.0, 11.0, 9.5, 8.5])
def test_solve_finds_the_enumerated_optimum_under_the_cap(latency: float) -> None:
    one = capped()
    costs, weights, limits = Costs(one, predictor()), scores().arrays(one), {"latency_ms": latency}
    fitting = [v for v in every(one) if allowed(one, v) and costs.total("latency_ms", v) <= latency]
    found = solve(weights, costs, limits)
    if not fitting:
        assert found is None
        return
    assert found in fitting
    best = min(scores().estimate(one, v) for v in fitting)
    assert scores().estimate(one, found) == pytest.approx(best)
    free = solve(weights, Costs(space(), predictor()), {"latency_ms": 5.0})
    assert free is not None
    assert not allowed(one, free)  # the cap is what holds it back


def test_seeds_at_shares_of_the_limits_may_still_use_the_whole_cap() -> None:
    one = capped()
    found = seeds(scores().arrays(one), Costs(one, predictor()), {"latency_ms": 13.0}, 12, seed=0)
    assert all(allowed(one, vector) for vector in found)
    replaced = [
        sum(OFFERED[o].step("replace") is not None for o in (*v[:1], *v[2:])) for v in found
    ]
    assert max(replaced) == MOST


def test_repair_keeps_to_the_cap() -> None:
    one = capped()
    costs, limits = Costs(one, predictor()), {"latency_ms": 11.0, "size_bytes": 36.0}
    repair = Repair(scores().arrays(one), costs, limits)
    rng = np.random.default_rng(0)
    made = [repair.random(rng) for _ in range(60)]
    made += [repair.fit(v, rng) for v in every(one)[::7]]
    parent = next(v for v in made if v is not None)
    made += [repair.mutate(parent, rng) for _ in range(60)]
    fine = [vector for vector in made if vector is not None]
    assert len(fine) > 120
    assert all(costs.fits(vector, limits) and allowed(one, vector) for vector in fine)
    assert any(sum(o in (1, 2) for o in (*v[:1], *v[2:])) == MOST for v in fine)
    assert not repair.within((0, 0, 1, 1, 1))


def test_screening_and_proposals_keep_to_the_cap() -> None:
    one, table = capped(), predictor()
    budget = Budget(latency_ms=11.0)

    def evaluate(candidates):  # type: ignore[no-untyped-def]
        return [scores().estimate(one, one.encode(c)) for c in candidates]

    screened = screen(one, table, evaluate, budget, 40, 0, scores=scores())
    assert all(allowed(one, one.encode(item.candidate)) for item in screened)
    assert len(screened) > 10
    proposer = TrialProposer(one, screened, {None: table}, budget, scores=scores(), trials=8)
    asked = [proposer.ask() for _ in range(8)]
    vectors = [one.encode(p.candidate) for p in asked if p is not None]
    assert vectors
    assert all(allowed(one, vector) for vector in vectors)


def test_what_only_more_replacements_reach_is_told_with_what_is_reachable() -> None:
    one = capped()
    costs, free = Costs(one, predictor()), [np.zeros(n) for n in one.levels]
    lowest = min(costs.total("latency_ms", v) for v in every(one) if allowed(one, v))
    assert lowest > Costs(space(), predictor()).smallest("latency_ms")
    check_reachable(free, costs, {"latency_ms": lowest})
    with pytest.raises(InfeasibleError, match=rf"the smallest in this space is {lowest:.3g} ms"):
        check_reachable(free, costs, {"latency_ms": lowest - 0.1})
