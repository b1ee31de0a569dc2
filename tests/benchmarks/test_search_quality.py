"""The comparison of searches counts what it says, and every method does what its name says."""

from __future__ import annotations

import copy
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "models")]

from model_examples import EXAMPLES  # noqa: E402

from autocomp.core.candidate import Candidate, Option, Step  # noqa: E402
from autocomp.core.unit import Unit  # noqa: E402
from autocomp.library.store import Library  # noqa: E402
from autocomp.models.surgery import copy_for_surgery, replace_module, skip  # noqa: E402
from autocomp.search.space import Space, Vector  # noqa: E402
from benchmarks.search_quality import enumerated, large, linears, measures, tables  # noqa: E402
from benchmarks.search_quality.dimensions import Dimensions  # noqa: E402
from benchmarks.search_quality.enumerate import Truth, Walk  # noqa: E402
from benchmarks.search_quality.linears import linear_problem  # noqa: E402
from benchmarks.search_quality.methods import FRONT_METHODS, METHODS, OURS, run, run_front  # noqa: E402
from benchmarks.search_quality.problem import (  # noqa: E402
    AdditiveCosts,
    Evaluated,
    Problem,
    Recorder,
    StopError,
)

LEVELS = (Option(), *(Option((Step.of("rtn", weights=bits),)) for bits in (8, 4, 2)))
BYTES, DAMAGE = (32.0, 8.0, 4.0, 2.0), np.array([0.0, 0.01, 0.1, 1.0])
UNITS = 6
SKIP = Option((Step.of("skip"),))


def problem(limit: float | None = 0.2) -> Problem:
    """Six units of four levels; a limit relative to dense."""
    names = [f"layers.{n}.ffn" for n in range(UNITS)]
    units = [Unit(name, "ffn", (), layer=n) for n, name in enumerate(names)]
    terms = {
        name: {option.key: (1 + n) * size for option, size in zip(LEVELS, BYTES, strict=True)}
        for n, name in enumerate(names)
    }
    space = Space(units, dict.fromkeys(names, LEVELS))
    costs = AdditiveCosts({"size_bytes": 10.0}, {"size_bytes": terms})
    dense = 10.0 + sum((1 + n) * BYTES[0] for n in range(UNITS))
    return Problem(space, costs, {} if limit is None else {"size_bytes": limit * dense})


def truth(vector: Vector) -> float:
    """Damage that neighbours multiply: nearly additive where little is done."""
    importance = np.array([5.0, 1.0, 3.0, 1.0, 2.0, 4.0])
    alone = importance * DAMAGE[list(vector)]
    return float(alone.sum() + 0.3 * (alone[1:] * alone[:-1]).sum())


def optimum(found: Problem) -> float:
    every = product(*(range(count) for count in found.space.levels))
    return min(truth(v) for v in every if found.costs.fits(v, found.limits))


def test_evaluations_are_counted_once_and_end() -> None:
    record = Recorder(problem(None), lambda vector: float(sum(vector)), most=3)
    a, b, c, d = ((level,) + (0,) * 5 for level in range(4))
    assert record([a, b, a]) == [0.0, 1.0, 0.0]
    assert len(record.history) == 2
    assert record([c]) == [2.0]
    with pytest.raises(StopError):
        record([d])
    assert record([a]) == [0.0]  # known: free ...
    with pytest.raises(StopError):
        record([a])  # ... until there were twice as many proposals as evaluations
    assert [one.vector for one in record.history] == [a, b, c]


def test_a_run_ends_at_its_target_only_within_the_limits() -> None:
    record = Recorder(problem(0.2), lambda vector: 0.0, most=9, enough=0.0)
    assert record([(0,) * 6]) == [0.0]  # dense: too large
    with pytest.raises(StopError):
        record([(3,) * 6])
    assert [one.fits for one in record.history] == [False, True]
    assert measures.evaluations_until(record.history, 0.0) == 2


def test_measures_of_a_run() -> None:
    history = [Evaluated((n,), kl, fits) for n, (kl, fits) in enumerate([(1, 0), (3, 1), (2, 1)])]
    assert measures.evaluations_until(history, 2.5) == 3
    assert measures.evaluations_until(history, 1.5) is None
    assert [measures.best_after(history, n) for n in (1, 2, 3)] == [None, 3, 2]
    assert measures.middle([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert measures.middle([7]) == (7, 7, 7)


def test_igd_plus_is_that_of_its_definition() -> None:
    """d+ of Ishibuchi et al. 2015, as pymoo has it, in plain loops; and where it is not IGD."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        points, front = rng.random((7, 3)), rng.random((5, 3))
        expected = 0.0
        for z in front:
            distances = []
            for a in points:
                behind = [max(a_m - z_m, 0.0) for a_m, z_m in zip(a, z, strict=True)]
                distances.append(sum(one**2 for one in behind) ** 0.5)
            expected += min(distances) / len(front)
        assert measures.igd_plus(points.tolist(), front.tolist()) == pytest.approx(expected)
    assert measures.igd_plus([(0.0, 0.0)], [(0.5, 0.0), (0.0, 0.5)]) == 0.0
    assert measures.igd_plus([(1.0, 0.0)], [(0.0, 1.0)]) == 1.0  # √2 in IGD


def test_the_front_of_pairs() -> None:
    points = [(2, 2), (1, 3), (3, 1), (2, 3), (1, 3), (4, 0.5)]
    assert measures.pareto(points) == [(1, 3), (2, 2), (3, 1), (4, 0.5)]


@pytest.mark.parametrize("name", METHODS)
def test_methods_search_the_problem(name: str) -> None:
    """All get nearer the optimum than a first try; those with repair never leave the budget."""
    found = problem()
    record = Recorder(found, truth, most=80)
    assert run(name, found, record, 1) is record.history
    assert 50 < len({one.vector for one in record.history}) == len(record.history) <= 80
    for one in record.history:
        assert one.kl == truth(one.vector)
        assert one.fits == found.costs.fits(one.vector, found.limits)
    proposed = record.history[18:] if name in OURS else record.history
    share = np.mean([one.fits for one in proposed])
    if name in (*OURS, "tight", "tpe_repair", "nsga2_repair"):
        assert share == 1.0
    else:
        assert 0 < share < 1
    best = measures.best_after(record.history, len(record.history))
    assert best is not None
    assert best < 0.7 * np.median([one.kl for one in proposed if one.fits])
    if name in OURS:
        reached = measures.evaluations_until(record.history, 1.01 * optimum(found))
        assert reached is not None
        assert reached < 60


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("random", "tight")])
def test_methods_repeat_with_their_seed(name: str) -> None:
    runs = []
    for seed in (3, 3, 4):
        found = problem()
        history = run(name, found, Recorder(found, truth, most=40), seed)
        runs.append([one.vector for one in history])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("name", FRONT_METHODS)
def test_fronts_come_near_the_true_one(name: str) -> None:
    whole = problem(None)
    dense = whole.costs.total("size_bytes", (0,) * UNITS)
    limits = [{"size_bytes": share * dense} for share in (0.1, 0.15, 0.25)]
    record = Recorder(whole, truth, most=100)
    assert len(run_front(name, whole, limits, record, 0)) > 70
    every = product(*(range(count) for count in whole.space.levels))

    def point(vector: Vector) -> tuple[float, float]:
        return truth(vector) / truth((3,) * UNITS), whole.costs.total("size_bytes", vector) / dense

    front = measures.pareto([point(vector) for vector in every])
    distance = measures.igd_plus([point(one.vector) for one in record.history], front)
    assert distance < (0.01 if name == "ours" else 0.15)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_walk_finds_what_whole_models_give(name: str) -> None:
    """Every candidate of four units, against the stitched model run from end to end."""
    example = EXAMPLES[name]
    teacher, units, inputs = example.model(), example.units(), example.inputs(3)
    blocks = [unit for unit in units if unit.layer is not None][-4:]
    assert [unit.kind for unit in blocks] == ["attention", "ffn"] * 2
    scaled = Option((Step.of("rtn", weights=8),))
    space = Space(units, {unit.name: (Option(), scaled, SKIP) for unit in blocks})

    def stitch(candidate: Candidate) -> Any:
        """Skips, or halves the weights of a unit's last site."""
        model = copy_for_surgery(teacher)
        for unit in units:
            if candidate[unit.name] == SKIP:
                skip(model, unit)
            elif candidate[unit.name] == scaled:
                path = unit.sites[-1].name
                layer = copy.deepcopy(model.get_submodule(path))
                layer.weight.data *= 0.5
                replace_module(model, path, layer)
        return model

    with torch.no_grad():
        walk = Walk(teacher, space, stitch, lambda model: model(**inputs).logits)
        assert walk.parts == 9
        found = np.array([walk.part(index) for index in range(9)]).reshape([3] * 4)
        truth = Truth(space, AdditiveCosts({}, {}), found)
        every = list(product(*(range(count) for count in space.levels)))
        expected = [walk.whole(vector) for vector in every]
    assert [truth.lookup(vector) for vector in every] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert expected[0] == pytest.approx(0, abs=1e-6)
    assert len({round(kl, 9) for kl in expected}) > 70


def test_costs_of_all_candidates_are_those_of_each() -> None:
    found = problem()
    truth = Truth(found.space, found.predictor, np.zeros([4] * UNITS))
    sizes = truth.cost("size_bytes")
    for vector in ((0,) * 6, (3,) * 6, (0, 1, 2, 3, 0, 1)):
        assert sizes[vector] == pytest.approx(found.costs.total("size_bytes", vector))


def test_a_linear_space_costs_what_its_layers_do(tmp_path: Path) -> None:
    example = EXAMPLES["llama"]
    units = [unit for unit in example.units() if unit.layer is not None]
    options = [
        Option((*zeros, *rounding))
        for zeros in ((), (Step.of("sparsegpt", level=0.5),))
        for rounding in (
            (),
            *(
                (Step.of("gptq", weights=bits, group=group, activations=32),)
                for bits, group in ((8, 0), (4, 32), (4, 128))
            ),
        )
    ]
    offered = {unit.name: options for unit in units}
    library = Library(tmp_path)
    items: dict[tuple[str, str], str] = {}
    for unit in units:
        for at, option in enumerate(options[1:]):
            key = items[unit.name, option.key] = f"{unit.name}-{at}"
            error = {site.name: at + nth / 100 for nth, site in enumerate(unit.sites)}
            library.put(key, {}, {"error": error})
    target = SimpleNamespace(size_bytes=lambda left: left.weight_bits * left.rows)
    setting = SimpleNamespace(
        context=SimpleNamespace(
            target=lambda runtime: target, library_path=library.root, items=items
        ),
        plan=SimpleNamespace(units=units, options=offered),
    )
    found = linear_problem(setting)
    sites = [site for unit in units for site in unit.sites]
    assert found.space.names == tuple(site.name for site in sites)
    assert set(found.space.levels) == {8}
    assert len(found.dimensions) == 3 * len(sites)
    some = [0] * len(sites)
    some[3] = found.space.options[sites[3].name].index(options[1])
    expected = sum(site.rows * (8 if at == 3 else 32) for at, site in enumerate(sites))
    assert found.costs.total("size_bytes", some) == expected
    assert found.local is None, "few enough to be scored each"
    assert large.scores_of(found) == 7 * len(sites)

    with patch.object(linears, "EACH", 7 * len(sites) - 1):
        found = linear_problem(setting)
    assert large.scores_of(found) == len(sites), "the coarsest of each"
    assert found.local is not None
    last = units[0].sites[-1].name
    assert found.local[last][options[3].key].error == 2 + (len(units[0].sites) - 1) / 100


def test_dimensions_are_what_options_are_made_of() -> None:
    def option(zeros: float, bits: int, group: int) -> Option:
        sparse = (Step.of("sparsegpt", level=zeros),) if zeros else ()
        rounded = (Step.of("gptq", weights=bits, group=group),) if bits < 32 else ()
        return Option((*sparse, *rounded))

    ways = [(32, 0), (8, 0), (4, 128), (4, 32)]
    options = [option(zeros, *way) for way in ways for zeros in (0.75, 0.0)]
    names = ["layers.0.ffn", "layers.1.ffn", "head"]
    units = [Unit(name, "ffn", (), layer=0) for name in names]
    space = Space(units, {names[0]: options, names[1]: options})
    found = Dimensions(space, linears.AXES)
    assert list(found.distributions) == [
        f"{unit} {axis}" for unit in names[:2] for axis in ("zeros", "bits", "group")
    ]
    levels = [range(one.high + 1) for one in found.distributions.values()]  # type: ignore[attr-defined]
    assert [len(level) for level in levels] == [2, 3, 2, 2, 3, 2]
    reached = set()
    for values in product(*levels):
        vector = found.vector(dict(zip(found.distributions, values, strict=True)))
        assert found.vector(found.params(vector)) == vector
        reached.add(vector)
    assert reached == set(product(range(8), range(8), [0]))
    params = dict.fromkeys(found.distributions, 0) | {"layers.1.ffn zeros": 1}
    assert space.decode(found.vector(params))["layers.1.ffn"] == option(0.75, 4, 32)

    plain = Dimensions(space)
    assert list(plain.distributions) == names[:2]
    assert plain.vector({names[0]: 3, names[1]: 5}) == (3, 5, 0)
    assert plain.params((3, 5, 0)) == {names[0]: 3, names[1]: 5}
    with pytest.raises(ValueError, match=r"head: 2 options at \(0,\)"):
        Dimensions(
            Space([units[2]], {"head": [option(0, 4, 32), option(0, 32, 0)]}),
            {"zeros": linears.AXES["zeros"]},
        )


def test_regret_is_against_the_best_of_all() -> None:
    def row(*kls: float | None) -> list[float | None]:
        return [*kls, *[kls[-1]] * 500]

    best = {
        large.Run("ours", 0): row(None, None, 3.0, 2.0),
        large.Run("random", 0): row(None),
        large.Run("tpe", 0): row(5.0, 4.0),
    }
    results = {one: dict.fromkeys(large.LIMITS, kls) for one, kls in best.items()}
    found = large.regrets(results, scores=2)
    assert found["tight_ours_100"] == 0
    assert found["tight_tpe_100"] == 100
    assert "tight_random_400" not in found
    assert found["middle_best_kl"] == 2.0


def test_tables_have_a_cell_for_each_method() -> None:
    figures: dict[str, float] = {"most": 300.0, "candidates": 78125.0}
    limits = {metric: [1.0, 2.0, 3.0, 4.0, 5.0] for metric in ("latency_ms", "size_bytes")}
    results = {}
    for metric, row in limits.items():
        for at, limit in enumerate(row):
            figures[f"{metric}_{at}_limit_percent"] = figures[f"{metric}_{at}_fits_percent"] = 50.0
            for method in METHODS:
                for seed in range(enumerated.SEEDS):
                    taken = 30.0 + seed % 3 if method in OURS else 301.0
                    run_ = enumerated.Run(method, seed, enumerated.MOST, metric, limit)
                    results[run_] = {"evaluations": taken}
    figures |= enumerated.near_figures(limits, results, 78125)
    rows = tables.enumerated(figures)
    assert {len(row) for row in rows} == {len(METHODS) + 4}
    label, ours, _, _, random, *_, share, stock, others = rows[1]
    assert label == "latency ≤ 50% of dense, which 50% meet"
    assert (ours, random) == ("31 (30–32)", "> 300 (> 300–> 300)")
    assert (share, stock, others) == ("0.04", "≥ 9.7", "≥ 9.7")
    counted = ("dimensions", "options", "scores")
    some = {f"{model}_{key}": 1234.0 for model in large.CASES for key in counted}
    rows = tables.large({**some, "llama_tight_ours_400": 1.234})
    assert {len(row) for row in rows} == {len(METHODS) + 2}
    assert rows[3][0].startswith("llama, 1,234 dimensions, 8% of the bytes (1,234 of 1,234 options")
    assert rows[3][1:3] == ["– / – / 1.23", "– / – / –"]
