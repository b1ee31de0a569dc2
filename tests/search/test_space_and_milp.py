"""Encoding, scores, and the solver against enumeration."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from search_problems import LEVELS, Problem, embeddings, ffn, problem

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import InfeasibleError, InternalError
from autocomp.search.costs import Costs
from autocomp.search.milp import check_reachable, seeds, solve
from autocomp.search.scores import Scores, replace_one
from autocomp.search.space import Space, hamming


@pytest.fixture(scope="module")
def small() -> Problem:
    return problem(units=5, seed=3)


def test_encode_and_decode_are_inverse(small: Problem) -> None:
    space = small.space
    assert space.size == 5**5
    rng = np.random.default_rng(0)
    for _ in range(20):
        vector = space.random(rng)
        candidate = space.decode(vector)
        assert candidate in space
        assert space.encode(candidate) == vector
    assert len({space.random(rng) for _ in range(50)}) > 40


def test_a_unit_without_options_stays_dense() -> None:
    space = Space([ffn(0), embeddings()], {"layers.0.ffn": LEVELS})
    assert space.levels == (5, 1)
    assert space.free == (0,)
    assert space.decode((2, 0))["embeddings"].dense


def test_what_is_not_in_the_space_is_refused(small: Problem) -> None:
    stranger = Option((Step.of("rtn", weights=2),))
    candidate = Candidate.of(dict.fromkeys(small.space.names, stranger))
    assert candidate not in small.space
    assert Candidate.of({}) not in small.space
    with pytest.raises(InternalError, match="rtn weights=2 is not in this space"):
        small.space.encode(candidate)
    with pytest.raises(InternalError, match="do not exist: nope"):
        Space([ffn(0)], {"nope": LEVELS})
    with pytest.raises(InternalError, match="distinct"):
        Space([ffn(0)], {"layers.0.ffn": (LEVELS[1], LEVELS[1])})


def test_replace_one_lists_every_option_but_dense_alone(small: Problem) -> None:
    plan = replace_one(small.space)
    assert len(plan) == 5 * 4
    for unit, option, candidate in plan:
        changed = [name for name, chosen in candidate if not chosen.dense]
        assert changed == [unit]
        assert candidate[unit] == option


def test_scores_clip_noise_and_forbid_what_broke(small: Problem) -> None:
    unit = small.space.names[0]
    row = {LEVELS[1].key: -1e-4, LEVELS[2].key: math.nan, LEVELS[3].key: None}
    scores = Scores({unit: row})
    assert scores.of(unit, Option()) == 0.0
    assert scores.of(unit, LEVELS[1]) == 0.0
    assert scores.of(unit, LEVELS[2]) == scores.of(unit, LEVELS[3]) == math.inf
    with pytest.raises(InternalError, match="no replace-one score"):
        scores.of(unit, LEVELS[4])
    assert Scores(scores.to_json()).of(unit, LEVELS[2]) == math.inf


def _best(p: Problem, costs: Costs, limits: dict[str, float]) -> float | None:
    vectors = itertools.product(*(range(count) for count in p.space.levels))
    values = [p.scores.estimate(p.space, v) for v in vectors if costs.fits(v, limits)]
    return min(values, default=None)


@pytest.mark.parametrize(("latency", "size"), [(9.0, 1e6), (3.0, 150e3), (2.0, 80e3), (1.2, 60e3)])
def test_solve_finds_the_enumerated_optimum(small: Problem, latency: float, size: float) -> None:
    costs = Costs(small.space, small.predictor)
    limits = {"latency_ms": latency, "size_bytes": size}
    vector = solve(small.scores.arrays(small.space), costs, limits)
    assert vector is not None
    assert costs.fits(vector, limits)
    assert small.scores.estimate(small.space, vector) == pytest.approx(
        _best(small, costs, limits), rel=1e-3, abs=1e-9
    )


def test_peak_memory_is_a_third_constraint(small: Problem) -> None:
    costs = Costs(small.space, small.predictor.with_peak(1e6 + 2.0 * 20e3, 2.0))
    limits = costs.limits(Budget(latency_ms=5.0, peak_memory_bytes=1.3e6), 0.0)
    assert set(limits) == {"latency_ms", "peak_memory_bytes"}
    vector = solve(small.scores.arrays(small.space), costs, limits)
    assert vector is not None
    assert 1e6 + 2.0 * costs.total("size_bytes", vector) <= 1.3e6
    same = Costs(small.space, small.predictor)
    by_size = solve(
        small.scores.arrays(small.space), same, {"latency_ms": 5.0, "size_bytes": 150e3}
    )
    assert vector == by_size


def test_a_forbidden_option_is_never_chosen(small: Problem) -> None:
    costs = Costs(small.space, small.predictor)
    limits = {"latency_ms": 2.0, "size_bytes": 80e3}
    weights = small.scores.arrays(small.space)
    free = solve(weights, costs, limits)
    assert free is not None
    banned = [row.copy() for row in weights]
    changed = next(u for u, o in enumerate(free) if o)
    banned[changed][free[changed]] = np.inf
    other = solve(banned, costs, limits)
    assert other is not None
    assert other[changed] != free[changed]


def test_the_hamming_cut_holds(small: Problem) -> None:
    costs = Costs(small.space, small.predictor)
    weights = small.scores.arrays(small.space)
    limits = {"latency_ms": 3.0}
    first = solve(weights, costs, limits)
    assert first is not None
    second = solve(weights, costs, limits, avoid=[(first, 3)])
    assert second is not None
    assert hamming(first, second) >= 3


def test_seeds_are_distinct_feasible_reproducible_and_spread(small: Problem) -> None:
    costs = Costs(small.space, small.predictor)
    weights = small.scores.arrays(small.space)
    limits = {"latency_ms": 3.0, "size_bytes": 150e3}
    found = seeds(weights, costs, limits, 10, seed=1)
    assert len(set(found)) == len(found) == 10
    assert all(costs.fits(vector, limits) for vector in found)
    assert found[0] == solve(weights, costs, limits)
    assert found == seeds(weights, costs, limits, 10, seed=1)
    assert min(max(costs.excess(v, limits).values()) for v in found) < -0.2


def test_seeds_stop_when_the_space_is_exhausted() -> None:
    p = problem(units=1)
    costs = Costs(p.space, p.predictor)
    found = seeds(p.scores.arrays(p.space), costs, {"size_bytes": 60e3}, 20, seed=0)
    assert len(found) == len(set(found)) == 4


def test_an_unreachable_limit_says_what_is_reachable_what_binds_and_what_to_allow() -> None:
    units = [ffn(0), embeddings()]
    eight = Option((Step.of("rtn", weights=8),))
    space = Space(units, {"layers.0.ffn": LEVELS, "embeddings": (Option(), eight)})
    table = {
        "layers.0.ffn": {
            o.key: c for o, c in zip(LEVELS, [4e6, 1e6, 0.5e6, 0.2e6, 0], strict=True)
        },
        "embeddings": {Option().key: 23.6e6, eight.key: 5.9e6},
    }
    from search_problems import TablePredictor

    zero = {unit: dict.fromkeys(row, 0.1) for unit, row in table.items()}
    costs = Costs(space, TablePredictor(zero, table, 0.5, 2e6))
    weights = [np.zeros(5), np.zeros(2)]
    check_reachable(weights, costs, {"size_bytes": 8e6, "latency_ms": 1.0})
    with pytest.raises(InfeasibleError) as caught:
        check_reachable(weights, costs, {"size_bytes": 5e6, "latency_ms": 1.0})
    assert str(caught.value) == (
        "No candidate meets size ≤ 5 MB: the smallest in this space is 7.9 MB (embeddings 5.9 MB "
        "of it). Allow 4-bit embeddings (bits.weights), or raise the budget."
    )
    with pytest.raises(InfeasibleError, match=r"7\.9 MB \(embeddings .*smallest in this space is"):
        check_reachable(weights, costs, {"size_bytes": 5e6, "latency_ms": 0.1})
    fixed = Costs(space, TablePredictor(zero, zero, 0.5, 2e6))
    with pytest.raises(InfeasibleError, match=r"\(what no rule can change 2 MB of it\)\. Raise"):
        check_reachable(weights, fixed, {"size_bytes": 1e6})


def test_limits_that_only_clash_together_are_told_so(small: Problem) -> None:
    unit = small.space.units[0]
    slow_small = Option((Step.of("rtn", weights=4),))
    quick_large = Option((Step.of("rtn", weights=8),))
    space = Space([unit], {unit.name: (slow_small, quick_large)})
    from search_problems import TablePredictor

    latency = {unit.name: {slow_small.key: 4.0, quick_large.key: 1.0}}
    size = {unit.name: {slow_small.key: 1e6, quick_large.key: 2e6}}
    costs = Costs(space, TablePredictor(latency, size))
    with pytest.raises(InfeasibleError) as caught:
        seeds([np.zeros(2)], costs, {"latency_ms": 2.0, "size_bytes": 1.5e6}, 3, 0)
    text = str(caught.value)
    assert "together" in text
    assert "Within size ≤ 1.5 MB the smallest latency is 4 ms." in text
    assert "Within latency ≤ 2 ms the smallest size is 2 MB." in text
    assert text.endswith("Raise the budget.")


NOISY = """
import ctypes, sys
from autocomp.search import milp
from autocomp.search.costs import Costs

plain, c = milp.milp, ctypes.CDLL(None)

def noisy(*arguments, **named):
    c.puts(b"HighsMipSolverData::something")
    return plain(*arguments, **named)

milp.milp = noisy
c.puts(b"before")
import search_problems
problem = search_problems.problem(units=5, seed=3)
costs = Costs(problem.space, problem.predictor)
assert milp.solve(problem.scores.arrays(problem.space), costs, {"size_bytes": 1e12}) is not None
print("after")
"""


def test_what_the_solver_prints_stays_off_stdout() -> None:
    """HiGHS prints through C, whose buffer outlives the call where stdout is a pipe."""
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", NOISY],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": here},
        check=True,
    )
    assert ended.stdout.split() == ["before", "after"]
    assert "HighsMipSolverData::something" in ended.stderr
