"""Regular shapes: alike in all kept layers, within the limits, the least estimate of their kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from search_problems import TablePredictor, attention, embeddings, ffn, problem

from autocomp.core.budget import Budget
from autocomp.core.candidate import Option, Step
from autocomp.search.costs import Costs
from autocomp.search.regular import regular_shapes
from autocomp.search.scores import Scores
from autocomp.search.screening import screen, screen_on_each
from autocomp.search.space import Space

BITS = [Option((Step.of("rtn", weights=bits, activations=8, group=0),)) for bits in (8, 4)]
NARROW = [Option((Step.of("width", keep=keep),)) for keep in (64, 32)]
SKIP = Option((Step.of("skip"),))
LAYERS = 4


def setup(skip: bool = True) -> tuple[Space, TablePredictor, Scores]:
    """Four layers of two groups and a table; what an option costs and breaks is drawn once."""
    units = [embeddings()]
    options: dict[str, list[Option]] = {"embeddings": [Option(), *BITS]}
    for layer in range(LAYERS):
        units += [attention(layer), ffn(layer)]
        extra = [SKIP] if skip else []
        options[f"layers.{layer}.attention"] = [Option(), *BITS, *extra]
        options[f"layers.{layer}.ffn"] = [Option(), *BITS, *NARROW, *extra]
    rng = np.random.default_rng(3)
    price = {Option(): 1.0, BITS[0]: 0.5, BITS[1]: 0.4, NARROW[0]: 0.3, NARROW[1]: 0.2, SKIP: 0.0}
    table = {n: {o.key: price[o] for o in row} for n, row in options.items()}
    size = {n: {o.key: 1000 * price[o] for o in row} for n, row in options.items()}
    broken = {
        n: {o.key: float(rng.uniform(0.5, 1.0) * (1 - price[o])) for o in row}
        for n, row in options.items()
    }
    return Space(units, options), TablePredictor(table, size, 0.1, 100.0), Scores(broken)


@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
def test_shapes_are_regular_and_the_best_of_each_choice_of_layers_by_brute_force(
    share: float,
) -> None:
    space, predictor, scores = setup()
    costs = Costs(space, predictor)
    limits = {"latency_ms": share * costs.total("latency_ms", (0,) * len(space))}
    found = regular_shapes(space, costs, limits, scores.arrays(space))
    assert len(set(found)) == len(found) > 5
    best: dict[tuple[int, ...], float] = {}
    for vector in found:
        assert costs.fits(vector, limits)
        layers = [vector[1 + 2 * layer : 3 + 2 * layer] for layer in range(LAYERS)]
        kept = tuple(i for i, each in enumerate(layers) if each != (3, 5))
        assert len({layers[i] for i in kept}) == 1, "alike in all kept layers"
        best[kept] = min(best.get(kept, np.inf), scores.estimate(space, vector))
    assert {len(kept) for kept in best} >= {1, 2}
    for kept, estimate in best.items():
        brute = [
            scores.estimate(space, vector)
            for table, a, f in itertools.product(range(3), range(3), range(5))
            if costs.fits(
                vector := (
                    table,
                    *itertools.chain.from_iterable(
                        (a, f) if layer in kept else (3, 5) for layer in range(LAYERS)
                    ),
                ),
                limits,
            )
        ]
        assert estimate == pytest.approx(min(brute))


def test_without_skips_all_layers_are_kept_and_without_limits_there_is_nothing_to_fill() -> None:
    space, predictor, scores = setup(skip=False)
    costs = Costs(space, predictor)
    limits = {"size_bytes": 0.4 * costs.total("size_bytes", (0,) * len(space))}
    for vector in (found := regular_shapes(space, costs, limits, scores.arrays(space))):
        assert len({vector[1 + 2 * layer : 3 + 2 * layer] for layer in range(LAYERS)}) == 1
    assert len(found) == 3
    assert regular_shapes(space, costs, {}, scores.arrays(space)) == []
    assert regular_shapes(space, costs, {"size_bytes": 1.0}, scores.arrays(space)) == []


def test_a_large_space_is_sampled() -> None:
    """Seven groups of ten options are ten million ways to choose."""
    units = [embeddings(), *(ffn(layer) for layer in range(8))]
    rows = [Option((Step.of("rtn", weights=8, group=group),)) for group in range(10)]
    options = {unit.name: [*rows[at:], *rows[:at]] for at, unit in enumerate(units)}
    price = {o.key: 1.0 + i for i, o in enumerate(rows)}
    table = {unit.name: price for unit in units}
    scores = Scores({unit.name: {o.key: 1 / price[o.key] for o in rows} for unit in units})
    space = Space(units, options)
    costs = Costs(space, TablePredictor(table, table))
    limits = {"latency_ms": 40.0}
    found = regular_shapes(space, costs, limits, scores.arrays(space))
    assert 0 < len(found) <= 3
    assert found == regular_shapes(space, costs, limits, scores.arrays(space)), "the same each time"


def test_a_tenth_of_what_is_screened_is_regular_and_a_search_resumes_in_it() -> None:
    p = problem(seed=2)
    budget = Budget(latency_ms=3.0, size_bytes=150e3)

    def run(known: list, n: int = 60) -> list:
        return screen_on_each(
            p.space, {None: p.predictor}, p.evaluate, budget, n, 0, known, scores=p.scores
        )

    whole = run([])
    assert len(whole) == 60
    assert len({item.key for item in whole}) == 60
    regular = [item for item in whole if item.proposed_by == "regular"]
    assert 0 < len(regular) <= 6
    first = whole.index(regular[0])
    assert first >= 54
    assert whole[first : first + len(regular)] == regular
    assert all(item.kl == p.truth(p.space.encode(item.candidate)) for item in regular)
    before = p.evaluations
    assert run(whole) == whole
    assert p.evaluations == before
    again = run(whole[:-2])
    assert len(again) == 60
    assert p.evaluations == before + 2
    plain = screen(p.space, p.predictor, p.evaluate, budget, 60, 0, scores=p.scores)
    assert whole[:first] == plain[:first], "the rest is as it was"
